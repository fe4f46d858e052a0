"""Rollouts in another layout than that of training: the same tokens (invariant 15), from weights that were checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from megatron.core.resharding import swap_model_weights
from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService
from torch import Tensor

from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.hf_load import load_tensors
from megarlhf.errors import LayoutError, TrainingError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.role import FrozenRole, Role, TrainableRole
from megarlhf.models.spec import PRESETS, ModelSpec
from megarlhf.models.transformer import named_parameters
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout import refit
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.refit import RolloutCopy
from megarlhf.rollout.sampling import (
    RolloutConfig,
    RolloutLayout,
    SamplingConfig,
    check_drawn_by,
    check_rolls_out,
)
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import name_of
from tests.helpers.ranks import run_ranks
from tests.rollout.worlds import EOS, PAD, SPEC, actor, as_tensors, engine, prompts, random_weights

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=20)
SAMPLES = 3
TIED = SPEC.model_copy(update={"tie_embeddings": True})
EVEN = SPEC.model_copy(update={"vocab_size": 60})


def drawing(role: Role, tensor: int, data: int, **settings: Any) -> RolloutEngine:
    rollout = RolloutConfig(layout=RolloutLayout(tensor=tensor, data=data), **settings)
    return RolloutEngine(role, eos_ids=(EOS,), pad_id=PAD, max_sequence_length=40, settings=rollout)


def roll(layout: ParallelLayout, spec: ModelSpec, tensor: int, data: int) -> tuple:
    """A rollout of 5 prompts x 3 samples, and how far the trainer's log-probs are from the sampler's."""
    role = actor(layout, temperature=SAMPLING.temperature, spec=spec)
    sampler = drawing(role, tensor, data)
    rollout = sampler.generate(prompts(), SAMPLING, seed=7, group_size=SAMPLES)
    gap = (role.score(rollout) - rollout.sampler_logprobs).abs().max()
    return *as_tensors(rollout), float(gap), sampler.refits().get("refit/count", 0)


@pytest.fixture(scope="module")
def reference() -> dict[ModelSpec, tuple]:
    return {spec: run_ranks(roll, 1, ParallelLayout(), spec, 1, 1)[0] for spec in (SPEC, TIED)}


CASES = [
    (ParallelLayout(tensor=2, pipeline=2), 2, 2),
    (ParallelLayout(tensor=2, pipeline=2), 1, 4),
    (ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True), 1, 4),
    (ParallelLayout(tensor=2, data=2, sequence_parallel=True), 2, 2),
    (ParallelLayout(pipeline=2, virtual_pipeline=2, data=2), 2, 2),
    (ParallelLayout(pipeline=4), 2, 2),
    (ParallelLayout(data=4), 2, 2),
    (ParallelLayout(tensor=2, data=2), 1, 4),
    (ParallelLayout(context=2, pipeline=2), 2, 2),
    (ParallelLayout(pipeline=3), 1, 3),  # of 4 layers: embedding and head count as one each
]


@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["", "tied"])
@pytest.mark.parametrize(("layout", "tensor", "data"), CASES, ids=str)
def test_the_same_tokens_are_drawn_in_another_layout(
    layout: ParallelLayout, tensor: int, data: int, spec: ModelSpec, reference: dict[ModelSpec, tuple]
) -> None:
    """The vocabulary is 61 rows: two tensor ranks pad it, one does not."""
    ranks = run_ranks(roll, layout.world_size, layout, spec, tensor, data)
    for tokens, lengths, terminated, logprobs, gap, count in ranks:
        assert torch.equal(tokens, reference[spec][0])
        assert torch.equal(lengths, reference[spec][1])
        assert torch.equal(terminated, reference[spec][2])
        assert torch.equal(logprobs, ranks[0][3])
        # Sums over 64 numbers in another order, through 4 layers: a few units of 1e-6.
        torch.testing.assert_close(logprobs, reference[spec][3], atol=1e-5, rtol=0)
        assert gap < 1e-5
        assert count == 1


def roll_at_home(layout: ParallelLayout) -> tuple[int, dict, int]:
    """Where rollout.layout is that of training, how many models there are more, what refits cost, and who draws."""
    sampler = drawing(actor(layout), 1, 2)
    sampler.generate(prompts(), SAMPLING, seed=7)
    return len(sampler.copies), sampler.refits(), sampler.mesh.size("data")


@pytest.mark.parametrize("layout", [ParallelLayout(data=2), ParallelLayout(context=2)], ids=name_of)
def test_nothing_is_copied_to_where_it_is(layout: ParallelLayout) -> None:
    assert run_ranks(roll_at_home, 2, layout) == [(0, {}, 2)] * 2


def by_the_library(layout: ParallelLayout, other: ParallelLayout) -> bool:
    """Whether Megatron-Core's own resharding makes the weights that ours makes, bit for bit."""
    role = actor(layout, spec=EVEN)
    ours = RolloutCopy(role, other, keep=False)
    theirs = FrozenRole("copy", EVEN, "language", role.reading, role.settings, role.mesh.arranged(other))
    swap_model_weights(role.model, theirs.model, GlooCopyService())
    with ours.resident():
        pairs = list(zip(named_parameters(ours.chunks), named_parameters(theirs.chunks), strict=True))
        return len(pairs) == 27 and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.mark.parametrize(("tensor", "data"), [(2, 2), (1, 4)])
def test_the_weights_are_those_that_megatron_makes_of_them(tensor: int, data: int) -> None:
    """Where it can: of a vocabulary that nobody pads, and one chunk a rank."""
    other = ParallelLayout(tensor=tensor, data=data)
    assert run_ranks(by_the_library, 4, ParallelLayout(tensor=2, pipeline=2), other) == [True] * 4


def learn_and_draw(layout: ParallelLayout, keep: bool) -> tuple[list[int], list[bool]]:
    """Refits of each of five rollouts, two of the first weights; and whether each is what training's layout draws."""
    role = actor(layout, temperature=SAMPLING.temperature, kind=TrainableRole)
    assert isinstance(role, TrainableRole)
    role.prepare(OptimConfig(lr=1e-2, schedule="constant"), 4)
    here, there = engine(role), drawing(role, 2, 2, keep=keep)
    counts, same = [], []

    def draw() -> TokenBatch:
        mine, theirs = (each.generate(prompts(8), SAMPLING, seed=7, group_size=SAMPLES) for each in (here, there))
        counts.append(int(there.refits().get("refit/count", 0)))
        same.append(torch.equal(mine.tokens, theirs.tokens))
        return TokenBatch(mine.tokens, mine.lengths, mine.response_mask)

    rows = draw()
    draw()
    assert role.update(rows, next_token_loss(role)).stepped
    draw()
    load_tensors(role, random_weights(SPEC, seed=6))
    draw()
    there.release()
    draw()
    return counts, same


@pytest.mark.parametrize(("keep", "counts"), [(False, [1, 1, 1, 1, 1]), (True, [1, 0, 1, 1, 1])])
def test_weights_are_moved_again_once_they_have_changed(keep: bool, counts: list[int]) -> None:
    for found, same in run_ranks(learn_and_draw, 4, ParallelLayout(tensor=2, pipeline=2), keep):
        assert found == counts
        assert all(same)


def broken(spoil: Callable[[Mesh, Sequence[tuple[Tensor, int]]], None]) -> list[str]:
    """What is said of a refit after whose arrivals `spoil` is called; then, that the next one is right again."""
    role = actor(ParallelLayout(tensor=2, pipeline=2))
    sampler, exchange = drawing(role, 1, 4), refit.exchange

    def badly(sends: Any, receives: Sequence[tuple[Tensor, int]], mesh: Mesh) -> None:
        exchange(sends, receives, mesh)
        spoil(mesh, receives)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "exchange", badly)
        with pytest.raises(TrainingError) as caught:
            sampler.generate(prompts(), SAMPLING, seed=7)
    assert sampler.copies[0].resident_bytes() == 0
    fine = sampler.generate(prompts(), SAMPLING, seed=7)
    assert torch.equal(fine.tokens, engine(role).generate(prompts(), SAMPLING, seed=7).tokens)
    return [str(caught.value)]


def one_bit(mesh: Mesh, receives: Sequence[tuple[Tensor, int]]) -> None:
    """Of the first norm that rank 3 has from elsewhere: all other copies of the model are right."""
    if mesh.rank == 3:
        norm = next(tensor for tensor, _ in receives if tensor.ndim == 1)
        norm.view(torch.int32)[5] ^= 1


def other_place(mesh: Mesh, receives: Sequence[tuple[Tensor, int]]) -> None:
    """Two rows of embedding and projection change places, on every rank that has them from elsewhere."""
    for tensor, _ in receives:
        if tensor.shape == (31, SPEC.hidden_size):
            tensor[[3, 4]] = tensor[[4, 3]]


@pytest.mark.parametrize(
    ("spoil", "count", "named"),
    [(one_bit, 1, "decoder.layers.0.input_layernorm.weight"), (other_place, 2, "embedding.word_embeddings.weight")],
    ids=["one_bit", "other_place"],
)
def test_weights_that_arrive_damaged_are_found_by_name_on_every_rank(spoil: Any, count: int, named: str) -> None:
    said = run_ranks(broken, 4, spoil)
    assert len({line for (line,) in said}) == 1
    assert said[0][0].startswith(f"refit of the actor to rollout.layout: {count} of 27 weights differ from those")
    assert f", {named} first; set rollout.layout=null" in said[0][0]


def bytes_over_time(offload: str) -> dict[str, list[tuple[int, int]]]:
    """Bytes of training's weights and of the copy: before, inside and after a rollout, and when weights arrive."""
    role = actor(ParallelLayout(tensor=2, pipeline=2))
    role.settings = type(role.settings)(**{**vars(role.settings), "offload": offload})
    role.leave()
    sampler = drawing(role, 1, 4)
    (copy,) = sampler.copies
    seen: dict[str, list[tuple[int, int]]] = {}

    def look(when: str) -> None:
        seen.setdefault(when, []).append((role.resident_bytes(), copy.resident_bytes()))

    drawn, exchange = sampler._drawn, refit.exchange

    def inside(*args: Any) -> Any:
        look("inside")
        return drawn(*args)

    def moving(*args: Any) -> None:
        look("moving")
        exchange(*args)

    look("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_drawn", inside)
        patch.setattr(refit, "exchange", moving)
        sampler.generate(prompts(), SAMPLING, seed=7)
    look("after")
    seen["planned"] = [(role.planned.weights, copy.planned.weights)]
    return seen


@pytest.mark.parametrize("offload", ["host", "none"])
def test_the_copy_is_in_memory_while_it_is_drawn_from_and_the_original_as_offload_says(offload: str) -> None:
    for seen in run_ranks(bytes_over_time, 4, offload):
        ((own, copy),) = seen["planned"]
        assert copy == 4 * (SPEC.parameters)  # whole, in fp32
        waiting = own if offload == "none" else 0
        assert seen["before"] == seen["after"] == [(waiting, 0)]
        assert seen["moving"] == [(own, copy)]
        assert seen["inside"] == [(waiting, copy)]


def buckets_of(size: int) -> tuple[int, bool]:
    """How many exchanges of at most so many bytes a refit is made in, and whether it is the same refit."""
    role = actor(ParallelLayout(tensor=2, pipeline=2))
    exchange, calls = refit.exchange, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "BUCKET", size)
        patch.setattr(refit, "exchange", lambda *args: (calls.append(1), exchange(*args)))
        rollout = drawing(role, 1, 4).generate(prompts(), SAMPLING, seed=7)
    return len(calls), torch.equal(rollout.tokens, engine(role).generate(prompts(), SAMPLING, seed=7).tokens)


def test_weights_travel_in_buckets() -> None:
    # An embedding of 61 x 64 numbers is 15,616 bytes; fc1, the largest weight, 49,152; 27 weights of at least 256.
    assert run_ranks(buckets_of, 4, 1) == [(27, True)] * 4
    assert run_ranks(buckets_of, 4, 2**28) == [(1, True)] * 4


def steps_are_padded_to(layout: ParallelLayout, tensor: int, data: int) -> list[int]:
    sampler = drawing(actor(layout), tensor, data)
    context = sampler._context(4)
    return [context.round_up_tokens(1), context.round_up_requests(1)]


def test_steps_are_padded_for_the_tensor_ranks_that_take_them() -> None:
    """Megatron's context asks the global state, which is that of training."""
    assert run_ranks(steps_are_padded_to, 2, ParallelLayout(tensor=2), 1, 2) == [[1, 1]] * 2
    assert run_ranks(steps_are_padded_to, 2, ParallelLayout(data=2), 2, 1) == [[2, 2]] * 2


def check(layout: ParallelLayout, rollout: RolloutConfig, spec: ModelSpec = SPEC) -> None:
    check_rolls_out(layout, rollout, offload="host", fp8=False)
    check_drawn_by(spec, layout, rollout, "actor.init")


def refused(layout: ParallelLayout, rollout: RolloutConfig, spec: ModelSpec = SPEC) -> str:
    with pytest.raises(LayoutError) as caught:
        check(layout, rollout, spec)
    return str(caught.value)


def elsewhere(tensor: int, data: int) -> RolloutConfig:
    return RolloutConfig(layout=RolloutLayout(tensor=tensor, data=data))


def test_another_layout_is_of_the_same_ranks() -> None:
    training = ParallelLayout(tensor=2, pipeline=3, data=2)
    assert refused(training, elsewhere(5, 2)) == (
        "rollout.layout is of 10 ranks (tensor 5 x data 2) but layout is of 12, which both train and draw; set "
        "rollout.layout.tensor=4 rollout.layout.data=3 or rollout.layout.tensor=6 rollout.layout.data=2."
    )


def test_another_layout_splits_the_model() -> None:
    training = ParallelLayout(tensor=2, pipeline=2, data=3)
    assert refused(training, elsewhere(4, 3), PRESETS["tiny-xs"]) == (
        "actor.init query groups=2 is not divisible by rollout.layout.tensor=4; set rollout.layout.tensor=1 "
        "rollout.layout.data=12 or rollout.layout.tensor=2 rollout.layout.data=6."
    )
    check(training, elsewhere(4, 3), PRESETS["tiny-m"])


def test_chunks_roll_out_elsewhere_or_not_at_all() -> None:
    training = ParallelLayout(pipeline=2, virtual_pipeline=2)
    assert refused(training, RolloutConfig()).endswith(
        "set layout.virtual_pipeline=1, or draw elsewhere: rollout.layout.tensor=1 rollout.layout.data=2 or "
        "rollout.layout.tensor=2 rollout.layout.data=1."
    )
    check(training, elsewhere(2, 1))
