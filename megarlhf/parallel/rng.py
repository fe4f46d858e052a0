"""Seeds by (run, purpose, place): two draws share a stream only when they should."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of numbers and names; the same on every machine and Python.

    `derive_seed(run_seed, "mini_batches", step)` and `derive_seed(run_seed, "rollout", step)` are unrelated streams.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`: the same numbers whatever the run's device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_model_parallel(seed: int) -> None:
    """Seed Megatron's trackers: equal on data ranks, different on tensor and pipeline ranks (Megatron's rule)."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed % 2**31)
