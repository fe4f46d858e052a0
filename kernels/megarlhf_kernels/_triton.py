"""Triton, imported in this one place: without it the kernels' files still import, and run their reference."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

INSTALLED = importlib.util.find_spec("triton") is not None
"""Whether `import triton` can work."""

triton: Any = importlib.import_module("triton") if INSTALLED else None
tl: Any = importlib.import_module("triton.language") if INSTALLED else None

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr if INSTALLED else None  # Triton reads the annotation's name


def jit(function: Callable) -> Any:
    """`triton.jit`, or without Triton the function itself: nobody launches it then."""
    return triton.jit(function) if INSTALLED else function


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU (TRITON_INTERPRET=1 before the first import)."""
    return INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
