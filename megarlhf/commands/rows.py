"""`megarlhf rows`: from a judged pool the rows that `sft`, `dpo` and `reward` learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megarlhf.config import Config
from megarlhf.errors import DONE, ConfigError
from megarlhf.eval.pool import Pool, open_pool, score_file
from megarlhf.eval.pool_rows import Candidate, candidates, demonstrations, labelled, pairs
from megarlhf.eval.pool_scores import Grid, Scores, check_judged, read_scores
from megarlhf.observe.files import json_line, write_whole
from megarlhf.observe.terminal import Terminal
from megarlhf.ops.step_scores import Aggregate
from megarlhf.runtime.outputs import check_new_file

Kind = Literal["sft", "pairs", "labelled"]
_NEEDED: Mapping[Kind, str] = {
    "sft": "response that has an end is right",
    "pairs": "two responses to one prompt that have an end are so far apart",
    "labelled": "response has an end",
}


class RowsConfig(Config):
    """`megarlhf rows`: rows to train on."""

    pool: Path
    """Directory of a pool that `megarlhf judge` has judged."""
    kind: Kind
    """`sft`: prompt and response, of the right ones where the judge knows, else of its best (data of `megarlhf sft`).
    `pairs`: prompt, chosen and rejected (`dpo`, `reward`: pairs). `labelled`: prompt, response and correct (`reward`:
    labelled)."""
    by: str
    """Judge of the pool. One that knows what is right gives 1 and 0; any other its score."""
    steps: Aggregate | None = None
    """Of a judge of steps, how their scores become the response's: `min`, `mean`, `last` or, where none is below 0,
    `product`."""
    output: Path
    """JSON lines file to write; any that exists is refused. OUTPUT.settings.json beside it says how it was made."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts that are used, drawn from `seed`; those of a smaller number are among them. null takes all."""
    responses: int | None = Field(default=None, ge=1)
    """Responses to each prompt that are used, drawn from `seed`; those of a smaller number are among them. null takes
    all."""
    most: int | None = Field(default=None, ge=1)
    """Demonstrations, or pairs, of one prompt at most; null for all, which kind=sft refuses where the judge does not
    know what is right. Of kind=labelled every response is a row."""
    margin: float = Field(default=0.0, ge=0)
    """By how much the chosen response of a pair must be better, in the judge's score; at 0 any difference will do."""
    seed: int = Field(default=1, ge=0)
    """Seed of which prompts and responses are used."""


def main(cfg: RowsConfig, _: Sequence[str]) -> int:
    """`megarlhf rows`."""
    settings_file = cfg.output.with_name(f"{cfg.output.name}.settings.json")
    for path in (cfg.output, settings_file):
        check_new_file(path)
    if cfg.margin and cfg.kind != "pairs":
        raise ConfigError(f"margin={cfg.margin:g} is of kind=pairs, not of kind={cfg.kind}; leave it out.")
    if cfg.most is not None and cfg.kind == "labelled":
        raise ConfigError(f"most={cfg.most} is of kind=sft and kind=pairs; leave it out, or set responses.")
    pool = open_pool(cfg.pool)
    check_judged(pool, cfg.by, "by")
    _check_axes(cfg, pool)
    scores = read_scores(pool, cfg.by)
    values = _values(cfg, scores)
    if cfg.kind == "sft" and cfg.most is None and not _tells_right(cfg, scores):
        raise ConfigError(
            f"kind=sft by={cfg.by}: it does not say which responses are right, so that every one would be a "
            "demonstration; set most, how many of the best of each prompt are."
        )
    found = candidates(pool, values, cfg.prompts, cfg.responses, cfg.seed)
    usable = {prompt: [each for each in of if each.usable] for prompt, of in found.items()}
    rows = [row for of in usable.values() for row in _made(cfg, scores)(of)]
    if not rows:
        lower = "lower margin, or " if cfg.margin else ""
        raise ConfigError(
            f"pool={cfg.pool}, by={cfg.by}: no row of kind={cfg.kind} is left, for no {_NEEDED[cfg.kind]}; {lower}use "
            "more prompts and responses."
        )
    write_whole(settings_file, json.dumps(_settings(cfg, pool), indent=2) + "\n")
    write_whole(cfg.output, "".join(map(json_line, rows)))
    left_out = sum(not each.usable for of in found.values() for each in of)
    asked = f"{sum(map(len, found.values())):,} responses to {len(found):,} prompts"
    cut = f"; {left_out:,} that were cut, are empty or have no score are left out" if left_out else ""
    Terminal(stderr=True, soft_wrap=True).print(f"{cfg.output}: {len(rows):,} rows, from {asked}{cut}")
    return DONE


def _check_axes(cfg: RowsConfig, pool: Pool) -> None:
    there = {"prompts": len(pool.prompts), "responses": pool.order.rounds[-1]}
    for name, asked in (("prompts", cfg.prompts), ("responses", cfg.responses)):
        if asked is not None and asked > there[name]:
            raise ConfigError(f"{name}={asked}: pool={cfg.pool} has {there[name]}; set {name}={there[name]} or less.")


def _values(cfg: RowsConfig, scores: Scores) -> Grid:
    """What each response is worth, [prompts, samples]."""
    if cfg.steps is not None and not scores.has_steps:
        raise ConfigError(f"steps={cfg.steps}: {cfg.by} judges no steps; leave it out.")
    if cfg.steps is None and scores.has_steps:
        raise ConfigError(f"by={cfg.by} judges steps; set steps to {_either(scores)}.")
    if cfg.steps is not None and cfg.steps not in scores.aggregates:
        raise ConfigError(
            f"steps={cfg.steps}: {cfg.by} gives steps scores below 0, of which two would make a good response; set "
            f"steps to {_either(scores)}."
        )
    return scores.right() if _tells_right(cfg, scores) else scores.scores(cfg.steps)


def _tells_right(cfg: RowsConfig, scores: Scores) -> bool:
    return cfg.steps is None and scores.knows


def _either(scores: Scores) -> str:
    *others, last = scores.aggregates
    return f"{', '.join(others)} or {last}"


def _made(cfg: RowsConfig, scores: Scores) -> Callable[[Sequence[Candidate]], list[dict[str, Any]]]:
    match cfg.kind:
        case "sft":
            least = 1.0 if _tells_right(cfg, scores) else None
            return lambda of: demonstrations(of, cfg.most, least)
        case "pairs":
            return lambda of: pairs(of, cfg.most, cfg.margin)
        case "labelled":
            return lambda of: labelled(of, cfg.by)


def _settings(cfg: RowsConfig, pool: Pool) -> Mapping[str, Any]:
    scores = score_file(cfg.pool, cfg.by)
    judge = json.loads(scores.with_name(f"{scores.name}.settings.json").read_text(encoding="utf-8"))
    return {**cfg.model_dump(mode="json"), "pool's settings": pool.about["settings"], "judge's settings": judge}
