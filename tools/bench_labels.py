"""Tokens/s of labelling steps: beginnings of a solution prefilled together and forked, beside every completion alone.

    python tools/bench_labels.py                          the built-in task's prompts as they are, and behind 8 examples
    python tools/bench_labels.py --json labels.json       ... and write everything measured, with what it ran on

Both sides draw the same completions with the same random numbers, in one engine: `together` as `megarlhf label_steps`
does, `apart` in an order in which no completion has a neighbour that begins as it does, so that each is prefilled in
full. A round is one of each, in turns; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.data.arithmetic import STEP_SEPARATOR, ArithmeticConfig, Mixture, step_rows, words
from megarlhf.data.rows import pad_right
from megarlhf.data.steps import given_ends
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole, RoleSettings
from megarlhf.observe.provenance import machine, versions
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InRows
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig

RIGHT = Mixture(right=1, drop_last_step=0, wrong_operation=0, guess=0)


@dataclass(frozen=True)
class Case:
    """What is labelled."""

    name: str
    examples: int
    """Solved problems before each prompt."""


CASES = (Case("the problem alone", 0), Case("behind 8 solved examples", 8))


def beginnings(case: Case, args: argparse.Namespace, tokenizer: Tokenizer) -> Prompts:
    """Of right solutions, one after another."""
    rows = step_rows(ArithmeticConfig(rows=args.solutions + case.examples, level=args.level, mixture=RIGHT), "train")
    shown = " ".join(f"{row['prompt']} {STEP_SEPARATOR.join(row['steps'])}" for row in rows[: case.examples])
    sequences, ids = [], []
    for number, row in enumerate(rows[case.examples :]):
        prompt = tokenizer.encode_prompt(f"{shown} {row['prompt']}".strip(), "plain")
        response = tokenizer.encode_response(STEP_SEPARATOR.join(row["steps"]))
        for step, end in enumerate(given_ends(response, row["steps"], STEP_SEPARATOR, tokenizer)[:-1]):
            sequences.append([*prompt, *response[: end + 1]])
            ids.append(number * 64 + step)
    tokens, lengths = pad_right(sequences, tokenizer.pad_id)
    return Prompts(tokens, lengths, torch.tensor(ids), ("",) * len(ids))


def measured(case: Case, args: argparse.Namespace, role: FrozenRole, tokenizer: Tokenizer) -> dict[str, Any]:
    """Seconds of every round, and the ratio."""
    prompts, sampling = beginnings(case, args, tokenizer), SamplingConfig(temperature=1.0, max_new_tokens=args.tokens)
    longest = int(prompts.lengths.max()) + args.tokens
    engine = RolloutEngine.of(role, tokenizer, longest, RolloutConfig(rows=args.rows))
    every = torch.arange(len(prompts))

    def together() -> Rollout:
        return engine.generate(prompts, sampling, seed=1, group_size=args.completions)

    def apart() -> Rollout:
        # Sample by sample over all solutions, a solution's beginnings far from one another.
        order = torch.cat([every[first::7] for first in range(7)])
        return engine.generate(prompts.rows(order.repeat(args.completions)), sampling, seed=1)

    seconds: dict[str, list[float]] = {"together": [], "apart": []}
    tokens = 0
    for number in range(args.repeats + 1):  # the first warms up
        for name, draw in (("together", together), ("apart", apart)):
            begun = time.perf_counter()
            drawn = draw()
            if number:
                seconds[name].append(time.perf_counter() - begun)
            tokens = int(drawn.response_lengths.sum())
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "case": case.name,
        "beginnings": len(prompts),
        "completions": args.completions,
        "prefix_tokens_mean": float(prompts.lengths.float().mean()),
        "completion_tokens_mean": tokens / (len(prompts) * args.completions),
        "tokens_per_s": {name: tokens / each for name, each in medians.items()},
        "ratio": medians["apart"] / medians["together"],
        "all_seconds": seconds,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny-xs", help="preset with random weights, or a model directory")
    parser.add_argument("--level", type=int, default=3, help="of the built-in task")
    parser.add_argument("--solutions", type=int, default=24)
    parser.add_argument("--completions", type=int, default=8, help="of each beginning")
    parser.add_argument("--tokens", type=int, default=16, help="of a completion at most")
    parser.add_argument("--rows", type=int, default=512, help="decoded at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    mesh, spec = start(ParallelLayout(), seed=1), describe_model(args.model).spec
    settings = RoleSettings(resolve(ComputeConfig(), mesh.device), cut=InRows(64), offload="none")
    role = FrozenRole("model", spec, "language", LabelLogprobs(1.0), settings, mesh)
    load_model(role, args.model, seed=1)
    tokenizer = build_tiny_tokenizer(words())
    found = [measured(case, args, role, tokenizer) for case in CASES]
    for case in found:
        rates = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in case["tokens_per_s"].items())
        print(
            f"{case['case']}: {case['beginnings']} beginnings of {case['prefix_tokens_mean']:.0f} tokens, "
            f"{case['completions']} completions of {case['completion_tokens_mean']:.1f}: {rates}, {case['ratio']:.2f}x"
        )
    if args.json is not None:
        ran = {"command": shlex.join(["python", "tools/bench_labels.py", *sys.argv[1:]])}
        about = {**ran, "versions": versions(), "machine": machine(mesh.device), "cases": found}
        args.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
