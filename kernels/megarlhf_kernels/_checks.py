"""Arguments of the public functions, checked before anything is launched: errors name the argument and what it is."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    """Raise ValueError unless `tensor` has the shape (None: any size), one of the dtypes, and the device of `like`.

    Rows must also be contiguous: the last dimension's stride is 1.
    """
    fits = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; must be [{wanted}].")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got {tensor.dtype}; must be {' or '.join(map(str, dtypes))}.")
    if tensor.device != like.device:
        raise ValueError(f"{name}: is on {tensor.device}; must be on {like.device} like the other arguments.")
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: strides {list(tensor.stride())} step over elements of a row; pass {name}.contiguous()."
        )


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is greater than 0 (NaN is not)."""
    if not value > 0:
        raise ValueError(f"{name}: {value}; must be positive.")
