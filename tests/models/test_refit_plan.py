"""Rollouts in another layout, from sizes alone: the copy, its cache, what a refit moves, and how long it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.commands.plan import job_of, settings_of
from megarlhf.config import load_config
from megarlhf.models.activations import Arithmetic
from megarlhf.models.gpus import GPUS
from megarlhf.models.memory_plan import BUCKET
from megarlhf.models.phases import PhaseBytes, copy_bytes, phases_of, rows_at_once
from megarlhf.models.spec import PRESETS
from megarlhf.models.step_time import LINK, rollout_seconds
from megarlhf.models.workload import Drawing, Job, RoleWork, Split, Workload
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InRows
from megarlhf.runtime.layouts import Machine, changes, check_split, nearest, options
from megarlhf.trainers import ppo
from tests.helpers.ranks import run_ranks
from tests.trainers.test_workload import POLICY

H100, MEMORY = GPUS["h100-80gb"], 70 << 30
ACTOR = RoleWork("actor", "actor.init", "a", "language", learns=True, scores=1, loss="fused")
REFERENCE = RoleWork("reference", "reference.init", "a", "language", scores=1)
TRAINED = ParallelLayout(tensor=8, pipeline=2, data=4, sequence_parallel=True)
DRAWN = ParallelLayout(tensor=8, data=8)
STAGE = 40 * (106_954_752 + 16_384) + 131_334_144
"""Weights of Llama 3 70B on a rank of the first of two stages: 40 layers and an eighth of the embedding."""
COPY = 80 * (106_954_752 + 16_384) + 2 * 131_334_144 + 8_192


def job(
    layout: ParallelLayout = TRAINED,
    elsewhere: ParallelLayout | None = DRAWN,
    *,
    model: str = "llama3-70b",
    offload: bool = True,
    keep: bool = False,
) -> Job:
    """512 rows of 512 + 1024 tokens; `elsewhere` is what the run asks for, too."""
    drawing = Drawing(512, 512, 0.8, 16_384, graphs=True, keep=keep, elsewhere=elsewhere)
    work = Workload((ACTOR, REFERENCE), 512, 1024, 512, 128, "global_batch", drawing=drawing)
    split = Split(layout, InRows(2), recompute="none", offload=offload, elsewhere=elsewhere)
    specs = {role.name: PRESETS[model] for role in work.roles}
    return Job(work, specs, split, Arithmetic(2, engine=True, recompute="none"))


def by_name(of: Job, memory: int = MEMORY) -> dict[str, PhaseBytes]:
    return {phase.name: phase for phase in phases_of(of, memory)}


def test_a_copy_has_all_layers() -> None:
    assert copy_bytes(job()) == 2 * COPY == 17_640_734_720
    assert copy_bytes(job(elsewhere=None)) == 0


def test_the_source_leaves_before_anything_is_drawn() -> None:
    phases = by_name(job())
    refit, rollout = phases["refit actor"], phases["rollout actor"]
    # On the last stage, with the final norm; and two buckets, of what is sent and what arrives.
    assert refit.weights == 2 * (STAGE + 8_192) + 2 * COPY
    assert refit.activations == 2 * BUCKET == 1 << 29
    assert rollout.weights == 2 * COPY
    assert phases["score actor"].weights == 2 * (STAGE + 8_192)
    assert "refit actor" not in by_name(job(elsewhere=None))


def test_without_offloading_the_copy_comes_on_top_and_may_stay() -> None:
    roles, first = 2 * 2 * (STAGE + 8_192), 2 * 2 * STAGE  # of the last stage, and of the first, which learns with most
    here, kept = (by_name(job(offload=False, keep=keep), 10**12) for keep in (False, True))
    for phases in (here, kept):
        assert phases["rollout actor"].weights == roles + 2 * COPY
        assert phases["refit actor"].weights == roles + 2 * COPY
    assert here["optimise actor"].weights == first
    assert kept["optimise actor"].weights == first + 2 * COPY
    assert (here["optimise actor"].cache, kept["optimise actor"].cache) == (0, kept["rollout actor"].cache)


def test_the_cache_is_that_of_all_layers_of_half_the_rows() -> None:
    # A row of 1536 tokens: 2 x 80 layers x 1 query group x 128 x 2 bytes a token.
    row = 1536 * 2 * 80 * 128 * 2
    assert [rows_at_once(job(elsewhere=other), MEMORY) for other in (None, DRAWN)] == [128, 64]
    assert by_name(job())["rollout actor"].cache == 64 * row
    assert by_name(job(elsewhere=None))["rollout actor"].cache == 128 * row // 2
    # What is left beside the copy: 80 % of 30.5 rows' are 24, one of them padding's, of which 8 ranks share 16.
    assert rows_at_once(job(), 2 * COPY + 30 * row + row // 2) == 16
    # Three rows a data rank are padded to what its tensor ranks share evenly.
    few = replace(job(), work=replace(job().work, rows=8 * 3))
    assert rows_at_once(few, MEMORY) == 8


@pytest.mark.parametrize(
    ("layout", "other", "had"),
    [
        (TRAINED, DRAWN, 1 / 2),  # its own stage
        (TRAINED, ParallelLayout(tensor=4, data=16), 0),  # the second of eight parts is not in the second of four
        (TRAINED.model_copy(update={"tensor": 4, "data": 8}), ParallelLayout(tensor=1, data=64), 1 / 8),
        (ParallelLayout(pipeline=4, data=16), DRAWN, 1 / 4),
        (ParallelLayout(tensor=2, data=32), ParallelLayout(tensor=4, data=16), 0),
    ],
)
def test_what_a_rank_has_not_itself_comes_over_the_network(
    layout: ParallelLayout, other: ParallelLayout, had: float
) -> None:
    of = job(layout, other, model="llama3-8b")
    half = replace(H100, network=H100.network / 2)
    slower = rollout_seconds(of, half, 10**12) - rollout_seconds(of, H100, 10**12)
    # The model comes from the host likewise in both.
    assert slower == pytest.approx((1 - had) * copy_bytes(of) / (LINK * H100.network), rel=1e-9)


def test_drawing_without_stages_is_faster() -> None:
    plain, other = job(elsewhere=None), job()
    assert rollout_seconds(other, H100, MEMORY) < 0.9 * rollout_seconds(plain, H100, MEMORY)
    # A token passes one stage after another either way: half the rows are what is gained.
    fast = replace(H100, network=1e30, nvlink=1e30)
    assert rollout_seconds(other, fast, MEMORY) > 0.5 * rollout_seconds(plain, fast, MEMORY)


def test_a_run_that_draws_elsewhere_is_offered_the_fastest_layout_for_it() -> None:
    trained, drawn = ParallelLayout(pipeline=2, data=2), ParallelLayout(tensor=2, data=2)
    own = job(trained, drawn, model="llama3-8b", offload=True)
    machine = Machine(GPUS["h200-141gb"], spare=8.0)
    found = options(own, 4, machine)
    assert any(each.split.elsewhere is not None for each in found)
    for each in found:
        other = each.split.elsewhere
        check_split(each.job)
        assert other is None or (other.world_size == 4 and other != each.split.layout.drawing)
        if each.fits and other is not None:
            as_trained = each.job.splitting(replace(each.split, elsewhere=None))
            assert each.seconds.rollout <= rollout_seconds(as_trained, machine.gpu, machine.memory)
    near = nearest(found, own.split)
    assert near is not None
    assert near.split.layout == trained
    assert all(each.split.elsewhere is None for each in options(job(trained, None, model="llama3-8b"), 4, machine))


def test_changes_name_the_layout() -> None:
    split = job().split
    assert changes(split, replace(split, elsewhere=None)) == {"rollout.layout": "null"}
    assert changes(replace(split, elsewhere=None), split) == {"rollout.layout.tensor": "8", "rollout.layout.data": "8"}
    assert changes(split, replace(split, elsewhere=ParallelLayout(tensor=4, data=16))) == {
        "rollout.layout.tensor": "4",
        "rollout.layout.data": "16",
    }


def built(folder: str, lora: bool) -> tuple[int, int]:
    """Bytes of the copy that is made, and of that which is planned."""
    more = ["layout.pipeline=2", "rollout.layout.data=2", "compute.dtype=float32"]
    adapters = ["actor.lora.rank=4"] if lora else []
    cfg: Any = load_config(settings_of("ppo"), None, [f"run_dir={folder}", *POLICY, *more, *adapters])
    models = ppo.TRAINER.models(cfg, ppo.TRAINER.prepare(cfg), start(cfg.layout, seed=1))
    return models.sampler.copies[0].planned.weights, copy_bytes(job_of(ppo.TRAINER.workload(cfg), cfg))


@pytest.mark.parametrize("lora", [False, True])
def test_the_copy_is_that_which_is_built(lora: bool, tmp_path: Path) -> None:
    for made, planned in run_ranks(built, 2, str(tmp_path / "run"), lora):
        assert made == planned > 0
