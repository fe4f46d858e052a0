"""Seeds by (run, purpose, place): two draws share a stream only when they should."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of numbers and names; the same on every machine and Python.

    `derive_seed(run_seed, "mini_batches", step)` and `derive_seed(run_seed, "rollout", step)` are unrelated streams.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`: the same numbers whatever the run's device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def random_states(device: torch.device) -> dict[str, Tensor]:
    """This rank's generators, by name: torch's, and the GPU's where there is one."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing where `random_states` was called on a device of the same kind."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_model_parallel(seed: int) -> None:
    """Seed torch's generators, and give Megatron the tracker of its inference, which tracks nothing.

    There is no dropout, and weights are not drawn by Megatron: its layers draw nothing. CUDA graphs want this tracker.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed % 2**31, inference_rng_tracker=True)
