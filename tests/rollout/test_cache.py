"""How long the cache of a rollout lives, and that nothing in it reaches the next one."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any, Literal

import pytest
import torch

from megarlhf.errors import ConfigError
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.offload import resident_bytes
from megarlhf.rollout.context import RolloutContext
from megarlhf.rollout.controller import RolloutController
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig
from tests.helpers.ranks import run_ranks
from tests.rollout.worlds import EOS, PAD, SPEC, actor, as_tensors, engine, prompts

SAMPLING = SamplingConfig(temperature=0.8, max_new_tokens=20)
SAMPLES = 3


class Watched(RolloutEngine):
    """Notes what is in memory while the cache is there."""

    def _context(self, max_requests: int) -> RolloutContext:
        context = super()._context(max_requests)
        self.cache_bytes = context.memory_buffer.untyped_storage().nbytes()
        self.peak = live_bytes()
        return context


def live_bytes() -> int:
    gc.collect()
    return resident_bytes(found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


def memory_around_rollouts(offload: Literal["host", "none"], keep: bool) -> dict[str, list[int]]:
    """Of three rollouts: bytes before, at the cache's birth if there was one, and after, without the results."""
    role = actor(ParallelLayout())
    role.settings = dataclasses.replace(role.settings, offload=offload)
    role.leave()
    sampler = Watched(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=40, settings=RolloutConfig(keep=keep))
    found: dict[str, list[int]] = {"before": [], "peak": [], "after": [], "cache": []}
    drawn: set[bytes] = set()
    # What this process did before is still being given up: after this rollout, nothing is.
    sampler.generate(prompts(), SAMPLING, seed=1, group_size=SAMPLES)
    sampler.release()
    for _ in range(3):
        sampler.peak = 0
        found["before"].append(live_bytes())
        rollout = sampler.generate(prompts(), SAMPLING, seed=1, group_size=SAMPLES)
        # Results are views of what was drawn: they own their bytes, and nothing else may.
        results = resident_bytes(value for value in vars(rollout).values() if isinstance(value, torch.Tensor))
        found["after"].append(live_bytes() - results)
        found["peak"].append(sampler.peak)
        found["cache"].append(sampler.cache_bytes)
        drawn.add(b"".join(x.numpy().tobytes() for x in (rollout.tokens, rollout.sampler_logprobs)))
        del rollout
    assert len(drawn) == 1, "a cache that was used before changes what is drawn"
    sampler.release()
    found["after"].append(live_bytes())
    return found


@pytest.mark.parametrize(("offload", "keep"), [("host", False), ("none", False), ("none", True)])
def test_the_cache_is_given_back_at_once_or_in_the_end(offload: str, keep: bool) -> None:
    (found,) = run_ranks(memory_around_rollouts, 1, offload, keep)
    rows, width, numbers = 15 + 1, 40, 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim
    cache = rows * width * numbers * 4  # one row more, which padding writes to
    assert found["cache"] == [cache] * 3
    assert found["peak"][0] >= found["before"][0] + cache
    assert found["after"][1:3] == found["before"][1:]
    if keep:
        assert found["peak"][1:] == [0, 0]  # it was there
        assert found["after"][0] >= found["before"][0] + cache
        assert found["after"][3] <= found["after"][2] - cache
    else:
        assert all(peak >= before + cache for before, peak in zip(found["before"], found["peak"], strict=True))
        assert found["after"][3] == found["after"][2]


def kept_and_fresh(layout: ParallelLayout) -> list[bool]:
    """Whether each of several rollouts is what an engine of its own draws, after an interrupted one too."""
    role = actor(layout)
    settings = RolloutConfig(rows=6, keep=True)
    kept = RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=40, settings=settings)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=5)
    same = []
    rollouts = ((SAMPLING, 4, 3), (greedy, 12, 1), (SAMPLING, 6, 2), (SAMPLING, 4, 3), (SAMPLING, 2, 2))
    for sampling, count, group in rollouts:
        if len(same) == 2:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RolloutController, "_draw", interrupted_after(2))
                with pytest.raises(KeyboardInterrupt):
                    kept.generate(prompts(4), SAMPLING, seed=3, group_size=3)
        before = kept._live
        ours = as_tensors(kept.generate(prompts(count), sampling, seed=7, group_size=group))
        assert before is kept._live or before is None
        theirs = as_tensors(engine(role, max_requests=6).generate(prompts(count), sampling, seed=7, group_size=group))
        same.append(all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)))
    return same


def interrupted_after(steps: int) -> Any:
    """A draw that is interrupted in its step after so many."""
    draw, calls = RolloutController._draw, 0

    def interrupted(self: RolloutController, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KeyboardInterrupt
        return draw(self, *args)

    return interrupted


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(pipeline=2)])
def test_what_is_kept_leaks_nothing_into_the_next_rollout(layout: ParallelLayout) -> None:
    assert run_ranks(kept_and_fresh, layout.world_size, layout) == [[True] * 5] * layout.world_size


def keeps_what_moves() -> list[str]:
    """What is said of a cache that cannot be kept."""
    role = actor(ParallelLayout())
    compute = dataclasses.replace(role.settings.compute, fp8="hybrid")
    said = []
    for settings in (
        dataclasses.replace(role.settings, offload="host"),
        dataclasses.replace(role.settings, compute=compute),
    ):
        role.settings = settings
        with pytest.raises(ConfigError) as caught:
            RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=40, settings=RolloutConfig(keep=True))
        said.append(str(caught.value))
    return said


def test_what_moves_is_not_kept() -> None:
    moved, copied = run_ranks(keeps_what_moves, 1)[0]
    assert moved.startswith("rollout.keep=true with offload=host: ")
    assert moved.endswith("set offload=none, or rollout.keep=false.")
    assert copied.startswith("rollout.keep=true with compute.fp8: ")


def sizes_of_caches() -> list[int]:
    """Rows that caches were made for, in turn: smaller and larger rollouts than before, and the same again."""
    role = actor(ParallelLayout())
    sampler = Watched(
        role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=40, settings=RolloutConfig(rows=6, keep=True)
    )
    made = []
    for count in (2, 2, 5, 4, 1):
        sampler.cache_bytes = 0
        sampler.generate(prompts(count), SAMPLING, seed=1, group_size=2)
        made.append(sampler.cache_bytes // (40 * 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * 4))
    return made


def test_a_larger_rollout_has_a_cache_of_its_own_and_a_smaller_one_room_enough() -> None:
    # Four rows and the one for padding; the same; six at most, for all that follow.
    assert run_ranks(sizes_of_caches, 1)[0] == [5, 0, 7, 0, 0]
