"""The only package that knows ranks. Importing it makes Megatron-Core run on this machine's devices (see `cpu.py`)."""

from __future__ import annotations

from megarlhf.parallel import cpu

cpu.install()
