"""What a run's page says of its models, data and settings, from what the command has read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from megarlhf.config.settled import settled
from megarlhf.observe.about import About, DataFacts, ModelFacts, Setting, write_about
from megarlhf.observe.provenance import machine
from megarlhf.parallel.mesh import Mesh
from megarlhf.runtime.checks import Model
from megarlhf.runtime.said import DataSet
from megarlhf.runtime.settings import RanksConfig


def about(
    cfg: RanksConfig,
    models: Mapping[str, Model],
    sets: Iterable[DataSet],
    mesh: Mesh,
    *,
    epochs: Mapping[str, float],
    steps: int,
    unit: str = "steps",
) -> About:
    """What is known before the first step. models: by role. epochs: passes over a set, by its name."""
    return About(
        unit=unit,
        steps=steps,
        ranks=mesh.layout.world_size,
        device=str(machine(mesh.device)["device"]),
        models=tuple(
            ModelFacts(role, model.init, model.description.head, model.description.spec.parameters)
            for role, model in models.items()
        ),
        data=tuple(_facts(each, epochs.get(each.name)) for each in sets),
        settings=tuple(Setting(*each) for each in settled(cfg)),
    )


def leave_about(run_dir: Path, said: About, mesh: Mesh) -> None:
    """Write it into the run's directory, on rank 0."""
    if mesh.is_main:
        write_about(run_dir, said)


def _facts(each: DataSet, epochs: float | None) -> DataFacts:
    data, rows = each.data, each.rows
    return DataFacts(
        name=each.name,
        source=data.named,
        split="" if data.mix else ", ".join(filter(None, (data.subset, data.split or "train"))),
        rows=len(rows),
        dropped=rows.dropped,
        bad=len(rows.origin.bad),
        tokens=rows.count,
        template=data.rendering,
        shape=rows.origin.shape,
        epochs=epochs,
    )
