"""`megarlhf judge`: what judges say of every response of a pool, kept beside the responses.

A judge is asked of each distinct response once. The same command again goes on after the last whole line, and leaves a
judge alone that has judged them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megarlhf.commands.row_file import RowFile, finite, place_of
from megarlhf.data.row import Row
from megarlhf.errors import ConfigError
from megarlhf.eval.pool import SCORES, Pool, open_pool, score_file
from megarlhf.eval.pool_scores import ADDED
from megarlhf.judges import JudgeSettings
from megarlhf.judges.checks import check_name
from megarlhf.judges.function import FunctionConfig
from megarlhf.judges.judge import Judge, Verdict
from megarlhf.judges.panel import Court, build_panel
from megarlhf.judges.process_model import ProcessJudgeConfig
from megarlhf.judges.reward_model import ScalarModelConfig
from megarlhf.judges.texts import Reader, TextJudgeConfig
from megarlhf.models.spec import PRESETS
from megarlhf.observe.files import writing
from megarlhf.observe.progress import Progress
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.measuring import PART_ROWS
from megarlhf.runtime.checks import (
    Model,
    check_budget,
    check_longest_response,
    check_same_tokenizer,
    check_scores,
    check_tokenizer,
    checked_model,
)
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import check_directory, lock_of_file, sole_writer
from megarlhf.runtime.said import say
from megarlhf.runtime.settings import RanksConfig


class PoolJudgesConfig(RanksConfig):
    """`megarlhf judge`: scores of the responses of a pool."""

    first: ClassVar[tuple[str, ...]] = ("pool", "judges", "micro_batch", "layout.data", "layout.tensor")

    pool: Path
    """Directory of a pool, as `megarlhf generate pool=DIR` makes it. The scores come into it."""
    judges: dict[str, JudgeSettings] = Field(default={})
    """What scores the responses, by names of yours, as in `megarlhf ppo`. A judge of a name that is there already must
    have the same settings, but for its weight, which counts for nothing here."""


@dataclass(frozen=True)
class JudgeInputs:
    """Everything that was read and checked before a model is built."""

    pool: Pool
    models: Mapping[str, Model]
    """Those of judges that are models, by the judge's name."""
    files: Mapping[str, RowFile]
    """Of each judge, by its name."""
    rows: Sequence[Row]
    """Which response each line of such a file is of."""
    doubts: Sequence[str]
    """What is to be said of how the judges can judge these prompts."""


def prepare(cfg: PoolJudgesConfig) -> JudgeInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    if not cfg.judges:
        raise ConfigError("no judge; name one, as in judges.answer.kind=rule judges.answer.rule=maths.")
    for name in cfg.judges:
        check_name(name)
    pool = open_pool(cfg.pool)
    check_directory(cfg.pool / SCORES, "pool")
    source, doubts = str(cfg.pool), []
    models: dict[str, Model] = {}
    for name, settings in cfg.judges.items():
        if isinstance(settings, TextJudgeConfig):
            doubts.append(settings.check(f"judges.{name}", pool.prompts, source))
        elif isinstance(settings, ScalarModelConfig):
            models[name] = _checked(name, settings, pool, cfg)
    rows = [
        Row(source, number, {"row": pool.prompts.ids[each.place.prompt], "sample": each.place.sample})
        for number, each in enumerate(pool.distinct, start=1)
    ]
    files = {name: _file(name, settings, cfg) for name, settings in cfg.judges.items()}
    for file in files.values():
        file.done(rows)
    return JudgeInputs(pool, models, files, rows, [doubt for doubt in doubts if doubt])


def _checked(name: str, settings: ScalarModelConfig, pool: Pool, cfg: PoolJudgesConfig) -> Model:
    setting = f"judges.{name}.init"
    model = Model(setting, settings.init, checked_model(settings.init, cfg.layout, setting))
    check_scores(model)
    if isinstance(settings, ProcessJudgeConfig):
        settings.separator_of(f"judges.{name}", model)
    check_same_tokenizer(pool.tokenizer, f"pool={cfg.pool}", model)
    check_tokenizer(pool.tokenizer, model.description.spec, setting)
    longest = max(len(pool.prompts.tokens[each.place.prompt]) + len(each.ids) for each in pool.distinct)
    check_longest_response(f"pool={cfg.pool}", longest, model.description.spec, setting)
    check_budget(f"a prompt of pool={cfg.pool} with its response", longest, cfg)
    return model


def _file(name: str, settings: JudgeSettings, cfg: PoolJudgesConfig) -> RowFile:
    named = f"judges.{name} of pool={cfg.pool}"
    return RowFile(score_file(cfg.pool, name), _decisive(settings, cfg), ADDED, named, "give the judge another name")


def _decisive(settings: JudgeSettings, cfg: PoolJudgesConfig) -> dict[str, Any]:
    """The settings that decide what a judge says, by name. The layout is none: it changes rounding at most."""
    free = {"weight", *type(settings).free_to_change()}
    own = settings.model_dump(mode="json", exclude=free)
    if isinstance(settings, ScalarModelConfig):
        drawn = {"seed": cfg.seed} if settings.init in PRESETS else {}
        numbers = {"compute.dtype": cfg.compute.dtype, "compute.fp8": cfg.compute.fp8}
        return {**own, **place_of("init", settings.init), **drawn, **numbers}
    if isinstance(settings, FunctionConfig):
        file = Path(settings.function.rpartition(":")[0])
        return {**own, "function's content": hashlib.sha256(file.read_bytes()).hexdigest()[:16]}
    return own


def main(cfg: PoolJudgesConfig, argv: Sequence[str]) -> int:
    """`megarlhf judge`."""
    return on_ranks(cfg, argv, prepare, run)


def run(cfg: PoolJudgesConfig, inputs: JudgeInputs, mesh: Mesh) -> None:
    """Ask each judge of what it has not judged. Collective: every rank of the layout calls it."""
    pool = inputs.pool
    say([f"{pool.directory}: {pool.order.total:,} responses, {len(inputs.rows):,} of them distinct"], mesh)
    say(inputs.doubts, mesh)
    reader = Reader(pool.prompts, pool.tokenizer, mesh, cfg.timeout_s)
    on_main(lambda: _make_folder(pool.directory / SCORES), mesh)
    for name, file in inputs.files.items():
        with sole_writer(lock_of_file(file.path), f"judges.{name}", file.path, mesh):
            _complete(name, cfg, inputs, reader)


def _complete(name: str, cfg: PoolJudgesConfig, inputs: JudgeInputs, reader: Reader) -> None:
    """Ask one judge of what it has not judged. Collective."""
    file, rows, mesh = inputs.files[name], inputs.rows, reader.mesh
    # Again: since the input was checked, another process may have written it.
    done = on_main(lambda: file.done(rows), mesh)
    say(file.said(done, len(rows)), mesh)
    if done.rows == len(rows):
        return
    (judge,) = build_panel({name: cfg.judges[name]}, None, Court(inputs.models, reader, cfg)).judges
    with file.open_after(done) if mesh.is_main else nullcontext() as opened:
        for part, fields in _judged(judge, inputs.pool, done.rows, mesh):
            if opened is not None:
                file.write(opened, [rows[at] for at in part], fields)


def _make_folder(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(exist_ok=True)


def _judged(judge: Judge, pool: Pool, done: int, mesh: Mesh) -> Iterator[tuple[range, list[dict[str, Any]]]]:
    """Part by part, the responses after the first `done` and what is said of each. Collective; equal on every rank.

    A part starts at a multiple of its size, and the first is judged whole even if some of it is done: a response then
    has the same neighbours, and the same last bits, whether or not the command was interrupted.
    """
    size = PART_ROWS
    with Progress(len(pool.distinct) - done, f"judge {judge.name}", enabled=mesh.is_main) as bar:
        for first in range(done - done % size, len(pool.distinct), size):
            part = range(first, min(first + size, len(pool.distinct)))
            known = max(done - first, 0)
            verdict = judge.judge(pool.rollout([pool.distinct[at] for at in part]).to(mesh.device))
            yield part[known:], fields_of(verdict)[known:]
            bar.advance(len(part) - known)


def fields_of(verdict: Verdict) -> list[dict[str, Any]]:
    """What is kept of what a judge says of each response, as eval/pool_scores.py reads it."""
    scores = verdict.scores.tolist()
    parts = {name: values.tolist() for name, values in verdict.parts.items()}
    return [
        {
            "score": finite(score),
            "parts": {name: finite(values[row]) for name, values in parts.items()},
            "steps": [*map(finite, verdict.steps[row])] if verdict.steps else [],
            "correct": verdict.correct[row] if verdict.correct else None,
            "failed": bool(verdict.failed) and verdict.failed[row],
        }
        for row, score in enumerate(scores)
    ]
