"""Weights from and to disk, in any layout."""

from __future__ import annotations

import megarlhf.parallel  # noqa: F401  (before Megatron-Core is imported)
