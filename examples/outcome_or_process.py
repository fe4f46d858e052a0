"""Outcome or process? Reward models of both kinds, of the same solutions: told apart, choosing, and as PPO's reward.

    python examples/outcome_or_process.py                       # three seeds, an hour and more on two cores
    python examples/outcome_or_process.py --seeds 1             # one of them
    python examples/outcome_or_process.py --json results.json   # ... and write everything measured, with what it ran on

One policy learns three tasks from demonstrations of mixed quality: arithmetic of level 2, arithmetic of level 3
(longer, up to 40, with multiplication), and chain_sum of reasoning-gym in its own words (`pip install -e '.[tasks]'`).
Reward models learn the first alone, from 8 of the policy's own solutions to each problem: the outcome model whether
each ended right, the process model where each step leads. So the first task is in their domain, the others are not.
Each stage is a command of megarlhf, printed before it runs; what an earlier start made is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from megarlhf.data.arithmetic import (
    LARGEST_NUMBER,
    STEP_SEPARATOR,
    ArithmeticConfig,
    Mistake,
    Problem,
    Split,
    demonstration,
    judged_steps,
    problems,
)
from megarlhf.data.reasoning_gym import ReasoningGymConfig, task_rows
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError
from megarlhf.eval.intervals import mean, paired_difference
from megarlhf.observe.provenance import machine, versions

TASKS = {"level_2": "level 2 (taught)", "level_3": "level 3", "chain_sum": "chain_sum"}
"""What the policy can do, and how the tables call it."""
LEVELS = {"level_2": 2, "level_3": 3}
TERMS = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
MISTAKES: dict[Mistake, float] = {"none": 0.35, "drop_last_step": 0.35, "wrong_operation": 0.15, "guess": 0.15}
"""Of the demonstrations of chain_sum: those that the built-in task has by default."""
DEMONSTRATIONS = {"level_2": 9600, "level_3": 9600, "chain_sum": 4800}
TAUGHT, HELDOUT, POOLED, SAMPLES = 2000, 500, 200, 64
"""Problems that reward models learn from; held-out ones of each task, which policies answer; those of them that have a
pool, and the responses to each in it."""
SIZES = (1, 4, 8, 16, 64)
"""Of so many the best is chosen."""
WAYS = {
    "pass@n": "the verifier",
    "maj@n": "vote",
    "outcome": "outcome model",
    "process (min)": "process model, min",
    "process (product)": "process model, product",
}
"""By what, and how the tables call it."""
WORDS = re.compile(r"\w+|[^\w\s]")
SEPARATOR = shlex.quote(f'"{STEP_SEPARATOR}"')
SAMPLING = "sampling.max_new_tokens=48 sampling.temperature=1"
REWARD = "epochs=4 micro_batch=16 optim.lr=2e-3 optim.schedule=cosine optim.warmup_steps=20 optim.eps=1e-8"
PPO = (
    "actor.init=sft actor.optim.lr=2e-4 actor.optim.schedule=constant critic.optim.lr=1e-3 "
    "critic.optim.schedule=constant iterations=20 rollout_batch=256 global_batch=128 micro_batch=64 ppo_epochs=2 "
    "value_warmup_iterations=2 verifier=arithmetic"
)
STEPS = "critic.init=process judges.steps.kind=process judges.steps.init=process"
POLICIES = {
    "sft": "",
    "ppo_outcome": "critic.init=outcome judges.outcome.kind=model judges.outcome.init=outcome",
    "ppo_soft_min": f"{STEPS} judges.steps.reward=soft_min",
    "ppo_sum": f"{STEPS} judges.steps.reward=sum",
}
"""What each policy is rewarded by."""


def main() -> int:
    """Run what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="two or more for intervals")
    parser.add_argument("--directory", type=Path, default=Path("runs/outcome_or_process"))
    parser.add_argument("--ranks", type=int, default=2, help="data ranks of every command")
    parser.add_argument("--json", type=Path, help="file to write everything measured to")
    args = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for seed in args.seeds:
        directory = args.directory / f"seed_{seed}"
        try:
            make_data(directory, seed)
        except ConfigError as error:  # the package of one task is not there
            print(error, file=sys.stderr)
            return 2
        for made, command in commands(seed, args.ranks):
            if not (directory / made).exists():
                words = shlex.split(command)
                print(f"\nseed {seed}: megarlhf {shlex.join(words)}", flush=True)
                code = subprocess.run(
                    [sys.executable, "-m", "megarlhf.cli", *words], cwd=directory, check=False
                ).returncode
                if code:
                    print(
                        f"that ended with code {code}; once it is mended, the same start goes on here", file=sys.stderr
                    )
                    return code
        found[seed] = measured(directory)
    for part in parts(found):
        Console(width=None if sys.stdout.isatty() else 120).print(table(part))
    if args.json:
        of = {
            "ranks": args.ranks,
            "seeds": found,
            "machine": machine(torch.device("cpu")),
        }
        args.json.write_text(json.dumps({**of, "versions": versions()}, indent=1) + "\n", encoding="utf-8")
    return 0


def commands(seed: int, ranks: int) -> Iterator[tuple[str, str]]:
    """What each command makes, by which it is known to be done, and its words; in order."""
    common = f"seed={seed} layout.data={ranks}"
    learnt = f"prompts.source=arithmetic prompts.arithmetic.level=2 prompts.arithmetic.seed={seed + 1}"
    sft = f"""sft run_dir=sft model=tiny-xs tokenizer=tokenizer data.source=demonstrations.jsonl data.template=plain
        epochs=4 global_batch=64 micro_batch=32 optim.lr=3e-3 optim.min_lr=1e-4 optim.schedule=cosine
        optim.warmup_steps=30 optim.eps=1e-8 {common}"""
    label = f"""label_steps model=sft solutions.source=taught.jsonl verifier=arithmetic output=steps.jsonl
        separator={SEPARATOR} {SAMPLING} {common}"""
    outcome = f"""reward run_dir=outcome model=sft labelled.source=taught.jsonl labelled_batch=64
        normalise=standardise {REWARD} {common}"""
    process = f"""process_reward run_dir=process model=sft steps.source=steps.jsonl steps.separator={SEPARATOR}
        steps.labels=hard steps.threshold=0.01
        steps_batch=64 {REWARD} {common}"""
    judges = """judges.outcome.kind=model judges.outcome.init=outcome
        judges.process.kind=process judges.process.init=process"""
    yield trained("sft"), sft
    yield from pool("taught", f"{learnt} prompts.arithmetic.rows={TAUGHT}", 8, common)
    yield "steps.jsonl", label
    yield trained("outcome"), outcome
    yield trained("process"), process
    for task in TASKS:
        yield from pool(task, f"prompts.source={task}_pooled.jsonl", SAMPLES, common)
        best = f"{task}_best.json"
        yield best, f"judge pool={task} {judges} {common}"
        yield best, f"eval pool pool={task} gold=right output={best}"
        for model in ("outcome", "process"):
            of = f"{task}_{model}.json"
            sets = f"labelled.source={task}.jsonl steps.source={task}_steps.jsonl separator={SEPARATOR}"
            yield of, f"eval reward model={model} {sets} output={of} {common}"
    for policy, rewarded in POLICIES.items():
        if rewarded:
            yield trained(policy), f"ppo run_dir={policy} {rewarded} {learnt} {PPO} {SAMPLING} {common}"
        for task in TASKS:
            of = f"{policy}_{task}.jsonl"
            asked = f"prompts.source={task}_heldout.jsonl verifier=arithmetic"
            yield of, f"eval model={policy} {asked} output={of} {SAMPLING} {common}"


def pool(name: str, prompts: str, n: int, common: str) -> Iterator[tuple[str, str]]:
    """n responses to each prompt, whether each is right, and 8 of each prompt as rows."""
    rows = f"{name}.jsonl"
    yield rows, f"generate model=sft {prompts} n={n} pool={name} {SAMPLING} {common}"
    yield rows, f"judge pool={name} judges.right.kind=rule judges.right.rule=arithmetic"
    yield rows, f"rows pool={name} kind=labelled by=right responses=8 output={rows}"


def trained(run_dir: str) -> str:
    """What a run that has ended leaves."""
    return f"{run_dir}/model"


def make_data(directory: Path, seed: int) -> None:
    """The tokenizer, what the policy imitates, and the held-out problems; nothing where they are there."""
    if (directory / "demonstrations.jsonl").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    learnt: list[dict[str, Any]] = []
    for task, count in DEMONSTRATIONS.items():
        asked = problems_of(task, "train", count, seed)
        learnt += [{"prompt": prompt, "response": demonstrated(problem, rng)} for prompt, problem in asked]
        asked = problems_of(task, "heldout", HELDOUT, seed)
        heldout = [{"prompt": prompt, "answer": str(problem.answer)} for prompt, problem in asked]
        write(directory / f"{task}_heldout.jsonl", heldout)
        write(directory / f"{task}_pooled.jsonl", heldout[:POOLED])
        judged = [{**judged_steps(problem, demonstrated(problem, rng)), "prompt": prompt} for prompt, problem in asked]
        write(directory / f"{task}_steps.jsonl", judged)
    texts = [text for row in learnt for text in (row["prompt"], row["response"])]
    said = {word for text in texts for word in WORDS.findall(text)} | set(map(str, range(LARGEST_NUMBER + 1)))
    build_tiny_tokenizer(sorted(said)).save(directory / "tokenizer")
    write(directory / "demonstrations.jsonl", learnt)


def problems_of(task: str, split: Split, count: int, seed: int) -> list[tuple[str, Problem]]:
    """Prompts, and what they ask. Sums that pass below 0, which has no word, are left out."""
    if task in LEVELS:
        return [
            (each.text, each) for each in problems(ArithmeticConfig(level=LEVELS[task], rows=count, seed=seed), split)
        ]
    drawn = ReasoningGymConfig(rows=2 * count, seed=seed, parameters=TERMS, instruction="")
    found: list[tuple[str, Problem]] = []
    for row in task_rows("reasoning_gym:chain_sum", drawn, split):
        start, *terms = re.findall(r"([+-]?)(\d+)", row["metadata"]["expression"].replace(" ", ""))
        problem = Problem("", "", int(start[1]), tuple((sign, int(number), "") for sign, number in terms))
        if min(accumulate(int(sign + number) for sign, number in (start, *terms))) >= 0:
            found.append((row["prompt"], problem))
    return found[:count]


def demonstrated(problem: Problem, rng: Random) -> str:
    """A response, right or with a mistake, as often as the built-in task has them."""
    return demonstration(problem, rng.choices(list(MISTAKES), list(MISTAKES.values()))[0], rng)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measured(directory: Path) -> dict[str, Any]:
    """What the files of a seed say: by task, of both reward models, of the best of n, and of each policy."""
    found: dict[str, Any] = {}
    for task in TASKS:
        of = found[task] = {}
        for model in ("outcome", "process"):
            said = read(directory / f"{task}_{model}.json")
            judged = said["labelled"]["min" if model == "process" else "last"]
            of[model] = {
                "AUC": judged["auc"]["mean"],
                "right at 1/2": judged["accuracy"]["mean"],
                "first error, F1": said["steps"]["f1"]["mean"],
            }
        points = read(directory / f"{task}_best.json")["points"]
        of["best of n"] = {
            way: {point["n"]: point["mean"] for point in points if point["way"] == way and point["n"] in SIZES}
            for way in WAYS
        }
        right = {policy: sampled(directory / f"{policy}_{task}.jsonl") for policy in POLICIES}
        of["accuracy"] = {policy: float(each.mean()) for policy, each in right.items()}
        of["soft_min over outcome"] = paired_difference(right["ppo_outcome"], right["ppo_soft_min"])._asdict()
    return found


def read(path: Path) -> Any:
    """What a JSON file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def sampled(path: Path) -> torch.Tensor:
    """Whether the sampled response to each problem is right, 1 or 0."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return torch.tensor([float(row["correct"]) for row in rows if row["decoding"] == "sampled"])


class Part(NamedTuple):
    """A table: what it is of, its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def parts(seeds: Mapping[Any, Mapping[str, Any]]) -> list[Part]:
    """In percent: means over seeds, with Student's interval of 95 % where there are several."""
    found = list(seeds.values())

    def row(task: str, what: str, of: Sequence[Mapping[Any, float]]) -> list[str]:
        return [TASKS[task], what, *(said([each[key] for each in of]) for key in of[0])]

    models = [row(t, m, [each[t][m] for each in found]) for t in TASKS for m in ("outcome", "process")]
    best = [
        row(t, called, [each[t]["best of n"][way] for each in found]) for t in TASKS for way, called in WAYS.items()
    ]
    policies = [row(t, "sampled", [each[t]["accuracy"] for each in found]) for t in TASKS]
    gains = [[TASKS[t], "sampled", *(plus(each[t]["soft_min over outcome"]) for each in found)] for t in TASKS]
    return [
        Part("reward models", ["task", "model", *found[0]["level_2"]["outcome"]], models),
        Part("right, the best of n", ["task", "chosen by", *(f"n = {size}" for size in SIZES)], best),
        Part("right, of policies", ["task", "", *POLICIES], policies),
        Part(
            "gained by ppo_soft_min over ppo_outcome, seed by seed",
            ["task", "", *(f"seed {seed}" for seed in seeds)],
            gains,
        ),
    ]


def said(values: Sequence[float]) -> str:
    """The mean, and how far it is known."""
    of = mean(torch.tensor(values)) if len(values) > 1 else None
    return f"{100 * of.mean:.1f} ±{100 * (of.high - of.mean):.1f}" if of else f"{100 * values[0]:.1f}"


def plus(of: Mapping[str, float]) -> str:
    """A difference over the same problems, with its interval."""
    return f"{100 * of['mean']:+.1f} [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"


def table(part: Part) -> Table:
    """To print."""
    made = Table(title=part.title, title_justify="left")
    for at, column in enumerate(part.columns):
        made.add_column(column, justify="left" if at < 2 else "right")
    for row in part.rows:
        made.add_row(*row)
    return made


if __name__ == "__main__":
    sys.exit(main())
