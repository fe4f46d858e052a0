"""Tests marked `gpu` or `multi_gpu` are skipped where there are none; those marked `slow` have an hour."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter then. It looks when it is first imported, here or by another package.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
        for mark, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(mark) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), found {gpus}"))
