"""Responses from the actor's own weights, and judges that are rules."""

from __future__ import annotations

import megarlhf.parallel  # noqa: F401  (before Megatron-Core is imported)
