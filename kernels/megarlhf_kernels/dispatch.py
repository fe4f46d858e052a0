"""Which implementation runs: Triton on a GPU, the torch reference elsewhere."""

from __future__ import annotations

import functools
import logging
import os
from typing import Literal

import torch
from torch import Tensor

from megarlhf_kernels import _triton

Impl = Literal["auto", "reference", "triton"]

OVERRIDE = "MEGARLHF_KERNELS"
"""Environment variable: what "auto" means in this process."""

_log = logging.getLogger("megarlhf_kernels")


def use_triton(kernel: str, impl: Impl, tensor: Tensor) -> bool:
    """Whether `kernel` runs in Triton on `tensor`'s device.

    "auto" takes Triton on a GPU and the reference elsewhere; a GPU without Triton gets a warning, once. The environment
    variable MEGARLHF_KERNELS replaces "auto", and nothing else.

    Raises:   ValueError for another name; RuntimeError when "triton" is asked for and cannot be had, with the reason.
    """
    if impl == "auto":
        impl = _override()
        if impl == "auto" and not tensor.is_cuda:
            return False  # soon decided, for decode steps ask often; the interpreter is chosen by name only
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl: {impl!r}; must be 'auto', 'reference' or 'triton'.")
    if impl == "reference":
        return False
    obstacle = missing(tensor.device)
    if impl == "triton" and obstacle:
        raise RuntimeError(f"{kernel} cannot run in Triton: {obstacle}; use impl='reference' or 'auto'.")
    if obstacle:
        _warn_once(kernel, obstacle)
    return not obstacle


def missing(device: torch.device) -> str:
    """Why Triton cannot run on `device`, "" if it can."""
    if not _triton.INSTALLED:
        return "the package triton is not installed"
    if device.type != "cuda" and not _triton.interpreted():
        return f"the tensors are on {device.type}"
    return ""


def _override() -> Impl:
    value = os.environ.get(OVERRIDE, "auto")
    if value == "auto" or value == "reference" or value == "triton":
        return value
    raise ValueError(f"{OVERRIDE}={value!r} in the environment; must be 'auto', 'reference' or 'triton'.")


@functools.cache
def _warn_once(kernel: str, obstacle: str) -> None:
    _log.warning("%s runs its torch reference, which is slower: %s", kernel, obstacle)
