"""Numbers that are checked before anything is built, and seeds that mean the same everywhere."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from megarlhf.errors import LayoutError
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.offload import Offloader, resident_bytes
from megarlhf.parallel.rng import derive_seed, generator


def test_arithmetic() -> None:
    layout = ParallelLayout(tensor=2, pipeline=3, context=7, data=4, virtual_pipeline=5)
    assert (layout.world_size, layout.stages) == (168, 15)
    assert layout.drawing == ParallelLayout(tensor=2, pipeline=3, data=28, virtual_pipeline=5)
    assert ParallelLayout().world_size == ParallelLayout().stages == 1


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        (ParallelLayout(virtual_pipeline=2), ("layout.virtual_pipeline=2", "layout.pipeline=1", "at least 2")),
        (ParallelLayout(sequence_parallel=True), ("sequence_parallel=true", "layout.tensor=1", "at least 2")),
    ],
)
def test_contradictions_are_named(layout: ParallelLayout, parts: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        layout.check()
    assert all(part in str(caught.value) for part in parts)


def test_world_and_divisibility_are_named() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    layout.check()
    layout.check_world(8)
    said = r"8 ranks \(tensor 2 x pipeline 2 x data 2\) but 4 were started; set layout.data=1, or layout.elastic=true"
    with pytest.raises(LayoutError, match=said):
        layout.check_world(4)
    said = r"12 ranks \(tensor 2 x pipeline 1 x context 3 x data 2\) but 18 .* set layout.data=3, .* or start 12"
    with pytest.raises(LayoutError, match=said):
        ParallelLayout(tensor=2, context=3, data=2).check_world(18)
    layout.check_divides("heads", 6, "tensor", 2)
    with pytest.raises(LayoutError, match=r"heads=6 .*layout\.tensor=4"):
        layout.check_divides("heads", 6, "tensor", 4)


@pytest.mark.parametrize("field", ["tensor", "pipeline", "context", "data", "virtual_pipeline"])
def test_no_axis_is_empty(field: str) -> None:
    with pytest.raises(ValidationError):
        ParallelLayout.model_validate({field: 0})


def test_seeds_are_the_same_on_every_machine() -> None:
    """Recorded once: another value would change every run that anyone has made."""
    assert derive_seed(1, "rollout", 0) == 6446383407183968870
    assert derive_seed(1, "mini_batches", 0, 0) == 8914239207962238677
    drawn = torch.rand(3, generator=generator(1, "rollout", 0))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(6446383407183968870)))


def test_seeds_do_not_meet() -> None:
    seeds = [derive_seed(run, purpose, step) for run in range(8) for purpose in ("a", "b") for step in range(64)]
    assert len(set(seeds)) == len(seeds) == 1024
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    # Half of all bits are ones: 1024 x 63 fair coins stay within 1 % of a half (5 standard deviations).
    ones = sum(seed.bit_count() for seed in seeds) / (1024 * 63)
    assert ones == pytest.approx(0.5, abs=0.01)


def test_storages_come_and_go_under_their_views() -> None:
    flat = torch.arange(12.0)
    views = [flat[:5], flat[5:].view(7), torch.arange(3, dtype=torch.bfloat16)]
    copies = [view.clone() for view in views]
    mover = Offloader(keep_contents=True)
    assert resident_bytes(views) == 12 * 4 + 3 * 2  # the shared storage counts once
    mover.to_host(views)
    assert resident_bytes(views) == 0
    assert mover.is_away
    mover.to_device()
    assert not mover.is_away
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
    views[0].fill_(9.0)
    assert flat[4] == 9.0  # still one storage
    dropped = Offloader(keep_contents=False)
    dropped.to_host(views)
    dropped.to_device()
    assert not any(view.any() for view in views)


def test_elastic_layouts_take_the_data_ranks_that_there_are() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=4, elastic=True)
    assert layout.fitted(8) == ParallelLayout(tensor=2, pipeline=2, data=2, elastic=True)
    assert layout.fitted(16) == layout
    for ranks in (2, 6):  # less than a copy of the model, and one and a half
        with pytest.raises(LayoutError, match=f"but {ranks} were started; change the layout or start 16"):
            layout.fitted(ranks)
    with pytest.raises(LayoutError, match=r"set layout\.data=2, or layout\.elastic=true, which does, or start 16"):
        ParallelLayout(tensor=2, pipeline=2, data=4).fitted(8)
