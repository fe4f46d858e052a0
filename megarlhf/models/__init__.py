"""Llama models on Megatron-Core, and the roles they play."""

from __future__ import annotations

import megarlhf.parallel  # noqa: F401  (before Megatron-Core is imported)
