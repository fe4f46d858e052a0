"""Seconds of scoring and of an update: rows packed into a budget of tokens, beside rows padded, sorted and shuffled.

    python tools/bench_packing.py                         64 rows of 16 to 256 tokens, tiny-m, one thread
    python tools/bench_packing.py --json packing.json     ... and write everything measured, with what it ran on

`packed` is micro_batch_tokens, `sorted` is micro_batch: rows of like length together. `shuffled` takes the rows as they
come, which a run never does; it is what packing is often compared with. All three do the same work on the same rows
with the same model. A round is one of each, in turns; a ratio is that of the medians.

Seconds are the processor's, of this process: what else the machine does hardly changes them. The clock's are written
too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows, Rollout
from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import RoleSettings, TrainableRole
from megarlhf.models.spec import PRESETS
from megarlhf.observe.provenance import machine, versions
from megarlhf.parallel import pipeline
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens, MicroBatch, Shapes
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig

PROMPT = 8
"""Tokens of each row that are no response."""
WAYS = ("packed", "sorted", "shuffled")
PARTS = ("score", "update")

split = pipeline.split


def in_order(batch: Rollout, at: Tensor, shapes: Shapes, *, may_repeat: bool) -> list[MicroBatch[Rollout]]:
    """As `split` cuts them, but rows stay where they are."""
    rows = shapes.cut.rows if isinstance(shapes.cut, InRows) else 1
    parts: list[MicroBatch[Rollout]] = []
    for first in range(0, len(batch), rows):
        some = slice(first, first + rows)
        made = split(batch.rows(some), at[some], shapes, may_repeat=may_repeat)
        parts += [dataclasses.replace(part, sequence=part.sequence + first) for part in made]
    return parts


def ragged(args: argparse.Namespace) -> PolicyRows:
    """Rows of uniformly random lengths in random order, with what a policy learns from."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(args.shortest, args.longest + 1, (args.rows,), generator=draws)
    tokens = torch.randint(1, 100, (args.rows, args.longest), generator=draws)
    tokens[torch.arange(args.longest) >= lengths[:, None]] = 0
    unknown, rows = torch.zeros(args.rows, args.longest - 1), torch.arange(args.rows)
    rollout = Rollout(tokens, torch.full_like(lengths, PROMPT), lengths, rows >= 0, unknown, rows, ("",) * args.rows)
    return PolicyRows.random(rollout, unknown - 4.0, draws)


def sides(args: argparse.Namespace, batch: PolicyRows) -> tuple[TrainableRole, dict[str, Callable[[], Any]]]:
    """The model, and what is timed, by part and way."""
    mesh = start(ParallelLayout(), seed=1)
    found = describe_model(args.model)
    shared = RoleSettings(resolve(ComputeConfig(), mesh.device), InRows(args.micro_batch), "none")
    role = TrainableRole("actor", found.spec, "language", LabelLogprobs(1.0), shared, mesh)
    load_model(role, args.model, seed=1)
    role.prepare(OptimConfig(), 1000)
    loss = policy_loss(role, PPOConfig.model_validate({"run_dir": "unused"}))
    cuts: dict[str, Cut] = {"packed": InTokens(args.micro_batch_tokens)}

    def timed(part: str, way: str) -> Callable[[], Any]:
        def run() -> Any:
            role.settings = dataclasses.replace(shared, cut=cuts.get(way, shared.cut))
            with patch.object(pipeline, "split", in_order if way == "shuffled" else split):
                return role.score(batch.rollout) if part == "score" else role.update(batch, loss)

        return run

    return role, {f"{part}, {way}": timed(part, way) for part in PARTS for way in WAYS}


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each, round by round, of the processor and of the clock; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    clocked: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + repeats):
        for name, run in runs.items():
            used, begun = time.process_time(), time.perf_counter()
            run()
            if number:
                seconds[name].append(time.process_time() - used)
                clocked[name].append(time.perf_counter() - begun)
    return seconds, clocked


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", choices=sorted(name for name in PRESETS if name.startswith("tiny")), default="tiny-m"
    )
    for name, default, said in (
        ("rows", 64, "rows of the batch"),
        ("shortest", 16, "tokens of the shortest row"),
        ("longest", 256, "tokens of the longest row"),
        ("micro-batch", 8, "rows of a padded micro-batch"),
        ("micro-batch-tokens", 2048, "tokens of a packed one"),
        ("repeats", 7, "measured rounds"),
        ("threads", 1, "torch threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{said} (default {default})")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = ragged(args)
    role, runs = sides(args, batch)
    seconds, clocked = measure(runs, args.repeats)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{args.rows} rows, {int(batch.lengths.sum()):,} tokens, {args.model}: medians of {args.repeats} rounds, s")
    print(f"{'':<8}{'packed':>9}{'sorted':>9}{'shuffled':>10}{'packed / sorted':>17}{'packed / shuffled':>19}")
    ratios: dict[str, float] = {}
    for part in PARTS:
        packed, by_length, as_drawn = (medians[f"{part}, {way}"] for way in WAYS)
        ratios |= {f"{part}, packed / sorted": packed / by_length, f"{part}, packed / shuffled": packed / as_drawn}
        compared = f"{packed / by_length:>17.2f}{packed / as_drawn:>19.2f}"
        print(f"{part:<8}{packed:>9.3f}{by_length:>9.3f}{as_drawn:>10.3f}{compared}")
    if args.json:
        report = {
            "command": shlex.join(["python", "tools/bench_packing.py", *sys.argv[1:]]),
            "versions": versions(),
            "machine": machine(role.mesh.device),
            "settings": {name: value for name, value in vars(args).items() if name != "json"},
            "tokens": int(batch.lengths.sum()),
            "medians_s": medians,
            "ratios": ratios,
            "seconds": seconds,
            "clock_seconds": clocked,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
