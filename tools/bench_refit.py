"""Seconds of a rollout drawn through the pipeline of training, and of the same one drawn in other layouts.

    torchrun --nproc-per-node 4 tools/bench_refit.py --tensor 2 --pipeline 2 --elsewhere 2x2 1x4
    ... --json refit.json                                 ... and write everything measured, with what it ran on

All draw the same tokens, which is checked. The time of another layout is from the weights of training to the gathered
responses: moving the weights and comparing their checksums are in it. A round is one rollout of each, in turns; a ratio
is that of a round, and its median is told.

On CPUs it tells the busy seconds, too: a rank's processor time, of each stage the longest, the stages' added, as one
waits for another. It is what a rollout takes where every rank has a core of its own, and waits for stages alone; on
fewer cores than ranks a stage that waits leaves its core to another, and seconds do not show what waiting costs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megarlhf.batch.rollouts import Prompts
from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole, RoleSettings
from megarlhf.observe.provenance import machine, versions
from megarlhf.parallel.collectives import barrier, gather_objects
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start, stop
from megarlhf.parallel.micro_batches import InRows
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, RolloutLayout, SamplingConfig

AT_HOME = "in the layout of training"


def engines(args: argparse.Namespace, role: FrozenRole) -> dict[str, RolloutEngine]:
    """What draws, by where; no response ends before its limit, so that all are work of the same size."""
    layouts: dict[str, RolloutLayout | None] = {AT_HOME: None}
    for asked in args.elsewhere:
        tensor, data = map(int, asked.split("x"))
        layouts[f"tensor {tensor} x data {data}"] = RolloutLayout(tensor=tensor, data=data)
    longest = args.prompt_tokens + args.tokens
    return {
        where: RolloutEngine(
            role,
            eos_ids=(-1,),
            pad_id=0,
            max_sequence_length=longest,
            settings=RolloutConfig(layout=layout, keep=args.keep),
        )
        for where, layout in layouts.items()
    }


def prompts_of(args: argparse.Namespace, vocab: int) -> Prompts:
    """Random tokens."""
    tokens = torch.randint(2, vocab, (args.prompts, args.prompt_tokens), generator=torch.Generator().manual_seed(2))
    return Prompts(
        tokens, torch.full((args.prompts,), args.prompt_tokens), torch.arange(args.prompts), ("",) * len(tokens)
    )


def one_after_another(worked: float, engine: RolloutEngine) -> float:
    """Busy seconds of a rollout in which this rank was busy for `worked`. Collective."""
    longest: dict[int, float] = {}
    for stage, seconds in gather_objects((engine.mesh.pipeline_rank, worked), engine.mesh, "world"):
        longest[stage] = max(longest.get(stage, 0.0), seconds)
    return sum(longest.values())


def of_home(each: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each round, over what the layout of training took in it."""
    return {where: [a / b for a, b in zip(took, each[AT_HOME], strict=True)] for where, took in each.items()}


def medians(each: dict[str, list[float]]) -> dict[str, float]:
    """Of all rounds."""
    return {where: statistics.median(values) for where, values in each.items()}


def measured(args: argparse.Namespace, role: FrozenRole) -> dict[str, Any]:
    """Seconds of every round by where it drew, and what refits took of them."""
    prompts = prompts_of(args, role.spec.vocab_size)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=args.tokens)
    drawing = engines(args, role)
    seconds: dict[str, list[float]] = {where: [] for where in drawing}
    busy: dict[str, list[float]] = {where: [] for where in drawing}
    refits: dict[str, list[dict[str, float]]] = {where: [] for where in list(drawing)[1:]}
    for number in range(args.repeats + 1):  # the first warms up, and makes the plans
        role.version += 1  # as after a step of training
        drawn = {}
        for where, engine in drawing.items():
            barrier(role.mesh)
            begun, worked = time.perf_counter(), time.process_time()
            drawn[where] = engine.generate(prompts, sampling, seed=number, group_size=args.group).tokens
            worked = time.process_time() - worked
            barrier(role.mesh)
            taken, told = time.perf_counter() - begun, engine.refits()
            path = one_after_another(worked, engine)
            if number:
                seconds[where].append(taken)
                busy[where].append(path)
                if told:
                    refits[where].append(told)
        if not all(torch.equal(tokens, drawn[AT_HOME]) for tokens in drawn.values()):
            raise SystemExit(f"round {number}: not the same tokens everywhere; nothing is measured.")
    ratios, busy_ratios = of_home(seconds), of_home(busy)
    tokens = args.prompts * args.group * args.tokens
    return {
        "response_tokens": tokens,
        "tokens_per_s": {where: tokens / median for where, median in medians(seconds).items()},
        "ratio_of_seconds": medians(ratios),
        "ratio_of_busy_seconds": medians(busy_ratios),
        "refit_seconds": {
            where: statistics.median(told["refit/seconds"] for told in each) for where, each in refits.items()
        },
        "refit_gb_per_s": {
            where: statistics.median(told["refit/gb_per_s"] for told in each) for where, each in refits.items()
        },
        "all_seconds": seconds,
        "all_busy_seconds": busy,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny-m", help="preset with random weights, or a model directory")
    for axis in ("tensor", "pipeline", "data"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="of training")
    parser.add_argument("--elsewhere", nargs="+", default=["2x2", "1x4"], metavar="TENSORxDATA")
    parser.add_argument("--keep", action="store_true", help="cache and copy stay, as rollout.keep has it")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--group", type=int, default=4, help="responses to a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    mesh = start(ParallelLayout(tensor=args.tensor, pipeline=args.pipeline, data=args.data), seed=1)
    settings = RoleSettings(resolve(ComputeConfig(), mesh.device), cut=InRows(64), offload="none")
    spec = describe_model(args.model).spec
    role = FrozenRole("model", spec, "language", LabelLogprobs(1.0), settings, mesh)
    load_model(role, args.model, seed=1)
    found = measured(args, role)
    if mesh.is_main:
        for where, rate in found["tokens_per_s"].items():
            moved = found["refit_seconds"].get(where)
            cost = "" if moved is None else f", {moved:.3f} s of it moving weights"
            shares = f"{found['ratio_of_seconds'][where]:.2f} of the seconds"
            if mesh.device.type == "cpu":
                shares += f", {found['ratio_of_busy_seconds'][where]:.2f} of the busy seconds"
            print(f"{where}: {rate:,.0f} tokens/s, {shares}{cost}")
        if args.json is not None:
            ran = {"command": shlex.join(["tools/bench_refit.py", *sys.argv[1:]]), "layout": mesh.layout.model_dump()}
            about = {**ran, "parameters": spec.parameters, "versions": versions(), "machine": machine(mesh.device)}
            args.json.write_text(json.dumps({**about, **found}, indent=2) + "\n")
    stop()


if __name__ == "__main__":
    main()
