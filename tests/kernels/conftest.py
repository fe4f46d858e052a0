"""On a machine with a GPU Triton compiles, so that tests which run its kernels on CPU tensors have no interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarlhf_kernels._triton import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if interpreted():
        return
    skip = pytest.mark.skip(reason="Triton's interpreter is off; test_on_gpu.py runs the compiled kernels")
    for item in items:
        in_triton = isinstance(item, pytest.Function) and "triton" in item.name
        if in_triton and item.path.parent == Path(__file__).parent and not item.get_closest_marker("gpu"):
            item.add_marker(skip)
