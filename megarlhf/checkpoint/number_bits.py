"""Floats as whole numbers, which is what the parts of a training state keep: to the last bit, and readable JSON."""

from __future__ import annotations

import math
import struct


def bits_of(value: float) -> int:
    """The 64 bits of a double."""
    return int.from_bytes(struct.pack("<d", value), "little")


def float_of(bits: int) -> float:
    """The double of 64 bits; NaN where there are not so many."""
    return struct.unpack("<d", bits.to_bytes(8, "little"))[0] if 0 <= bits < 1 << 64 else math.nan
