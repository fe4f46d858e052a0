"""`megarlhf eval pool`: what the best of n is worth, by each judge of a pool, how often one of n is right, and the vote
of n; from responses that are there, for every n up to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.table import Table

from megarlhf.commands.row_file import finite
from megarlhf.config import Config
from megarlhf.errors import DONE, ConfigError
from megarlhf.eval.best_of import kl_of_best
from megarlhf.eval.pool import Pool, open_pool
from megarlhf.eval.pool_curves import Curve, answers_of, chosen_by, gold_of, passed, sizes_of, voted, ways_of
from megarlhf.eval.pool_scores import Scores, check_judged, read_scores
from megarlhf.observe.files import json_line, write_whole
from megarlhf.observe.terminal import Terminal
from megarlhf.runtime.outputs import check_new_file


class EvalPoolConfig(Config):
    """`megarlhf eval pool`: choosing among n responses."""

    pool: Path
    """Directory of a pool that `megarlhf judge` has judged."""
    gold: str
    """Judge of the pool that says what the chosen responses are worth: a verifier, for which that is the share that are
    right, or a reward model that you trust, for which it is their mean score."""
    proxy: str = ""
    """Judge of the pool that chooses; empty for each of them in turn. One that judges steps chooses by their minimum,
    mean, last and, where none is below 0, product."""
    output: Path | None = None
    """JSON file to write, with every number of the table; any that exists is refused. null writes none."""
    seed: int = Field(default=1, ge=0)
    """Seed of the choices that are drawn where those of a vote are too many to count; the error is then said."""


def main(cfg: EvalPoolConfig, _: Sequence[str]) -> int:
    """`megarlhf eval pool`."""
    if cfg.output is not None:
        check_new_file(cfg.output)
    pool = open_pool(cfg.pool)
    if len(pool.prompts) == 1:
        raise ConfigError(f"pool={cfg.pool} has one prompt, and intervals are over prompts; draw a pool of more.")
    check_judged(pool, cfg.gold, "gold")
    if cfg.proxy:
        check_judged(pool, cfg.proxy, "proxy")
    gold = read_scores(pool, cfg.gold)
    names = [cfg.proxy] if cfg.proxy else [name for name in pool.judges if name != cfg.gold]
    proxies = [gold if name == cfg.gold else read_scores(pool, name) for name in names]
    sizes = sizes_of(pool.order.rounds[-1])
    curves = curves_of(pool, gold, proxies, sizes, cfg.seed)
    _print(cfg, pool, sizes, curves)
    if cfg.output is not None:
        write_whole(cfg.output, json_line(_numbers(cfg, pool, sizes, curves)))
    return DONE


def curves_of(pool: Pool, gold: Scores, proxies: Sequence[Scores], sizes: Sequence[int], seed: int) -> list[Curve]:
    """One for each way to choose."""
    worth = gold_of(gold)
    curves = [chosen_by(way, ranked, worth, sizes) for each in proxies for way, ranked in ways_of(each).items()]
    if not gold.knows:
        return [*curves, chosen_by(f"{gold.judge} itself", worth, worth, sizes)]
    return [*curves, passed(worth, sizes), voted(answers_of(pool), worth, sizes, seed)]


def _print(cfg: EvalPoolConfig, pool: Pool, sizes: Sequence[int], curves: Sequence[Curve]) -> None:
    table = Table(title=f"one of n, by {cfg.gold}: {len(pool.prompts):,} prompts, 95 % intervals", title_justify="left")
    for column in ("n", "KL", *(curve.way for curve in curves)):
        table.add_column(column, justify="right", no_wrap=True)
    for row, size in enumerate(sizes):
        points = [curve.points[row] for curve in curves]
        cells = [f"{point.mean:.3f} ±{point.high - point.mean:.3f}" for point in points]
        table.add_row(str(size), f"{kl_of_best(size):.2f}", *cells)
    # As wide as the table: numbers that are cut help nobody.
    out = Terminal(width=max(80, 20 + sum(max(len(curve.way), 12) + 3 for curve in curves)))
    out.print(table)
    out.print("KL, in nats, is that of the best of n from the policy: ln n - (n - 1) / n, at most.")
    for curve in curves:
        if curve.error:
            out.print(f"{curve.way} is an estimate: its standard error is up to {curve.error:.1g}.")


def _numbers(cfg: EvalPoolConfig, pool: Pool, sizes: Sequence[int], curves: Sequence[Curve]) -> dict[str, Any]:
    points = [
        {
            "way": curve.way,
            "n": size,
            "mean": point.mean,
            "low": finite(point.low),
            "high": finite(point.high),
            "kl": kl_of_best(size),
            "error": curve.error,
        }
        for curve in curves
        for size, point in zip(sizes, curve.points, strict=True)
    ]
    of = {"pool": str(cfg.pool), "gold": cfg.gold, "prompts": len(pool.prompts), "responses": sizes[-1]}
    return {**of, "drawn": pool.about["settings"], "points": points}
