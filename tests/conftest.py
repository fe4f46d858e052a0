"""Tests marked `gpu` or `multi_gpu` are skipped where there are none; those marked `slow` have an hour."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter then. It looks when it is first imported, here or by another package.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Each test leaves this process as it found it, or the next run that starts in it fails in its stead."""
    yield
    assert not torch.distributed.is_initialized(), "this test left a process group behind; leave it in the test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
        for mark, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(mark) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), found {gpus}"))
