"""`megarlhf demo`: the whole pipeline on a laptop, from generated data to a policy that PPO has improved.

    built-in arithmetic -> SFT on demonstrations of mixed quality -> reward model on judged responses
    -> PPO with four colocated roles -> evaluation on held-out problems -> table, summary.json, report.html

Stages that finished are not run again, and a stage that was stopped goes on from its state.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.table import Table

from megarlhf.checkpoint.model_directory import MODEL, describe_model
from megarlhf.config import Config
from megarlhf.data.arithmetic import ArithmeticConfig
from megarlhf.data.preferences import LabelledData
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.rows import BUILT_IN, DataConfig
from megarlhf.data.sft import SftData
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError, OutputError, printable
from megarlhf.eval.accuracy import Evaluation, evaluate
from megarlhf.eval.intervals import Interval, mean, paired_difference, share
from megarlhf.judges.rules import RuleConfig
from megarlhf.judges.texts import Reader
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.observe import run_files
from megarlhf.observe.files import write_whole
from megarlhf.observe.lock import check_free
from megarlhf.observe.report import JudgedResponse, Report, SampleRow, SummaryRow, write_report
from megarlhf.observe.terminal import Terminal
from megarlhf.parallel import launch
from megarlhf.parallel.collectives import barrier, on_main
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start, stop
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runs.opening import sole_run
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.checks import Model, checked_model, resolve_tokenizer
from megarlhf.runtime.outputs import check_directory, sole_writer
from megarlhf.runtime.roles import frozen
from megarlhf.trainers import ppo, reward, sft
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.reward import RewardConfig
from megarlhf.trainers.role_config import FrozenConfig, LearnerConfig
from megarlhf.trainers.sft import SftConfig
from megarlhf.trainers.trainer import Trainer

SECONDS = "seconds.json"
"""What a stage has taken so far, in its directory."""
SUMMARY = "summary.json"
"""The figures of the table, in the demo's directory."""
MAX_NEW_TOKENS = 32
MAX_TOKENS = 96


class DemoConfig(Config):
    """Sizes of the demo; the stages' own settings follow from them."""

    run_dir: Path = Path("runs/demo")
    """Directory for everything the demo makes; finished stages found there are kept."""
    seed: int = Field(default=1, ge=0)
    """Seed of data, weights and rollouts."""
    layout: ParallelLayout = ParallelLayout(data=2)
    """Ranks along each axis; two, for a machine with two cores."""
    model: str = "tiny-s"
    """Preset of all four models."""
    level: int = Field(default=2, ge=1, le=4)
    """Difficulty of the arithmetic problems, 1 to 4."""
    demonstrations: int = Field(default=12_800, ge=2048)
    """Problems with one demonstration each, for SFT."""
    sft_epochs: float = Field(default=3.0, ge=1)
    """Passes over the demonstrations."""
    judged: int = Field(default=6400, ge=1280)
    """Judged responses for the reward model. Source: the issue of this demo, half a minute of training."""
    iterations: int = Field(default=22, ge=1)
    """PPO iterations."""
    rollouts: int = Field(default=256, ge=2)
    """Rollouts per PPO iteration."""
    problems: int = Field(default=1024, ge=2)
    """Held-out problems of the evaluation, the same before and after."""
    samples: int = Field(default=12, ge=1)
    """Problems whose responses before and after are shown in the report."""


def main(cfg: DemoConfig, argv: Sequence[str]) -> int:
    """`megarlhf demo`."""
    return launch.run(lambda: _check(cfg), lambda _: _run(cfg, argv), cfg.layout, argv)


def _check(cfg: DemoConfig) -> None:
    """What could stop a later stage is said before the first one starts."""
    check_directory(cfg.run_dir, "run_dir")
    check_free(cfg.run_dir / run_files.LOCK, f"run_dir={cfg.run_dir}", "run_dir")
    if cfg.rollouts % (4 * cfg.layout.data):
        raise ConfigError(
            f"rollouts={cfg.rollouts} is not divisible by {4 * cfg.layout.data} (4 micro-batches on each data rank); "
            "change it."
        )
    checked_model(cfg.model, cfg.layout, "model")


def sft_config(cfg: DemoConfig) -> SftConfig:
    """Imitation of good and bad demonstrations alike."""
    return SftConfig(
        **_shared(cfg, "sft"),
        model=cfg.model,
        tokenizer="arithmetic",
        data=SftData(**_data(cfg, cfg.demonstrations, seed=cfg.seed)),
        epochs=cfg.sft_epochs,
        global_batch=64,
        micro_batch=32,
        optim=OptimConfig(lr=2e-3, min_lr=1e-4, schedule="cosine", warmup_steps=30, eps=1e-8, weight_decay=0.01),
    )


def reward_config(cfg: DemoConfig) -> RewardConfig:
    """Right or wrong, learnt from judged demonstrations."""
    return RewardConfig(
        **_shared(cfg, "reward"),
        model=str(sft_config(cfg).model_dir),
        labelled=LabelledData(**_data(cfg, cfg.judged, seed=cfg.seed + 1)),
        heldout=LabelledData(**_data(cfg, 1000, seed=cfg.seed + 1, split="heldout")),
        normalise="standardise",
        labelled_batch=64,
        micro_batch=16,
        epochs=4.0,
        optim=OptimConfig(lr=1e-3, min_lr=5e-5, schedule="cosine", warmup_steps=20, eps=1e-8, weight_decay=0.01),
    )


def ppo_config(cfg: DemoConfig) -> PPOConfig:
    """All four roles on the same ranks."""
    actor, critic = OptimConfig(lr=1.5e-4, schedule="constant"), OptimConfig(lr=1e-3, schedule="constant")
    return PPOConfig(
        **_shared(cfg, "ppo"),
        actor=LearnerConfig(init=str(sft_config(cfg).model_dir), optim=actor),
        critic=LearnerConfig(optim=critic),
        reward=FrozenConfig(init=str(reward_config(cfg).model_dir)),
        prompts=DataConfig(**_data(cfg, 8000, seed=cfg.seed + 2)),
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS),
        iterations=cfg.iterations,
        rollout_batch=cfg.rollouts,
        group_size=1,
        global_batch=cfg.rollouts // 2,
        micro_batch=cfg.rollouts // (4 * cfg.layout.data),
        ppo_epochs=2,
        value_warmup_iterations=2,
        kl_coef=0.05,
    )


def _shared(cfg: DemoConfig, stage: str) -> dict[str, Any]:
    return {"run_dir": cfg.run_dir / stage, "seed": cfg.seed, "layout": cfg.layout, "save_every": 0}


def _data(cfg: DemoConfig, rows: int, *, seed: int, split: str = "train") -> dict[str, Any]:
    problems = ArithmeticConfig(level=cfg.level, rows=rows, seed=seed)
    fixed = {"source": BUILT_IN, "template": "plain", "max_tokens": MAX_TOKENS}
    return {**fixed, "split": split, "arithmetic": problems}


def _run(cfg: DemoConfig, argv: Sequence[str]) -> None:
    mesh = start(cfg.layout, seed=cfg.seed)
    with sole_writer(cfg.run_dir / run_files.LOCK, "run_dir", cfg.run_dir, mesh):
        _run_stages(cfg, argv, mesh)
    stop()


def _run_stages(cfg: DemoConfig, argv: Sequence[str], mesh: Mesh) -> None:
    seconds = [
        _stage(sft_config(cfg), sft.TRAINER, argv, mesh),
        _stage(reward_config(cfg), reward.TRAINER, argv, mesh),
        _stage(ppo_config(cfg), ppo.TRAINER, argv, mesh),
    ]
    began = time.monotonic()
    outcome = _evaluated(cfg, mesh)
    if mesh.is_main:
        _conclude(cfg, outcome, wall_s=sum(seconds) + time.monotonic() - began)


def _stage(settings: RunConfig, trainer: Trainer[Any, Any, Any], argv: Sequence[str], mesh: Mesh) -> float:
    """Run a stage, or what is left of it, unless its model is there; return the seconds it took, now and before."""
    clock = settings.run_dir / SECONDS
    if clock.exists() and (settings.model_dir / MODEL).exists():
        if not _made_with(settings):
            raise ConfigError(f"{settings.run_dir} was made with other settings; remove it or choose another run_dir.")
        if mesh.is_main:
            sys.stderr.write(printable(f"{settings.run_dir} is done; its model is in {settings.model_dir}\n"))
        return _seconds(clock)
    with sole_run(settings, mesh):
        on_main(lambda: None if _goes_on(settings) else _clear(settings.run_dir), mesh)
    # Every rank looks whether the directory is free: after rank 0 has let go of it, and before it takes it again.
    barrier(mesh)
    inputs = trainer.prepare(settings)
    barrier(mesh)
    with sole_run(settings, mesh):
        before, began = _seconds(clock) if clock.exists() else 0.0, time.monotonic()
        try:
            trainer.run(settings, inputs, argv, mesh)
        except BaseException:
            if mesh.is_main:
                with suppress(OutputError):  # why it stopped is what counts
                    write_whole(clock, json.dumps(before + time.monotonic() - began))
            raise
        seconds = before + time.monotonic() - began
        on_main(lambda: write_whole(clock, json.dumps(seconds)), mesh)
    return seconds


def _goes_on(settings: RunConfig) -> bool:
    """Whether what is there is a stage that was stopped; one killed right after its model, before its time, is none."""
    return _made_with(settings) and not settings.model_dir.exists()


def _made_with(settings: RunConfig) -> bool:
    """Whether the run in `run_dir` has these settings."""
    kept = settings.run_dir / run_files.CONFIG
    return kept.is_file() and kept.read_text(encoding="utf-8", errors="replace") == settings.to_yaml()


def _seconds(clock: Path) -> float:
    try:
        return float(json.loads(clock.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ConfigError(f"{clock} is damaged: it is no number of seconds; remove {clock.parent}.") from None


def _clear(run_dir: Path) -> None:
    """Remove what a stage left that cannot be gone on with, but for the lock."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != run_files.LOCK:
            path.unlink()


@dataclass(frozen=True)
class Outcome:
    """Both policies on the same held-out problems with the same random numbers."""

    prompts: PromptSet
    tokenizer: Tokenizer
    sampled: tuple[Evaluation, Evaluation]
    greedy: tuple[Evaluation, Evaluation]


def _evaluated(cfg: DemoConfig, mesh: Mesh) -> Outcome:
    inits = [str(sft_config(cfg).model_dir), str(ppo_config(cfg).model_dir)]
    tokenizer = resolve_tokenizer("", Model("model", inits[0], describe_model(inits[0])))
    prompts = load_prompts(DataConfig(**_data(cfg, cfg.problems, seed=cfg.seed + 3, split="heldout")), tokenizer)
    where, shared = str(reward_config(cfg).model_dir), ppo_config(cfg)
    judge = Model("reward", where, describe_model(where))
    scores = judge.description.scores()
    reward_model = frozen("reward", judge, scores, shared, mesh)
    reader = Reader(prompts, tokenizer, mesh, shared.timeout_s)
    scorer = RuleConfig(kind="rule", rule="arithmetic").scorer("verifier", reader)
    results: list[list[Evaluation]] = [[], []]
    for init in inits:
        policy = frozen("policy", Model("model", init, describe_model(init)), LabelLogprobs(1.0), shared, mesh)
        for kind, temperature in zip(results, (1.0, 0.0), strict=True):
            sampling = SamplingConfig(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
            kind.append(evaluate(policy, reward_model, reader, scorer, sampling, seed=cfg.seed))
    (sampled_before, sampled_after), (greedy_before, greedy_after) = results
    return Outcome(prompts, tokenizer, (sampled_before, sampled_after), (greedy_before, greedy_after))


def _conclude(cfg: DemoConfig, outcome: Outcome, *, wall_s: float) -> None:
    rows = _table_rows(outcome)
    gain = paired_difference(outcome.sampled[0].correct, outcome.sampled[1].correct)
    summary = {
        "sft_accuracy": share(outcome.sampled[0].correct).mean,
        "ppo_accuracy": share(outcome.sampled[1].correct).mean,
        "gain": gain.mean,
        "gain_ci95": [gain.low, gain.high],
        "sft_accuracy_greedy": share(outcome.greedy[0].correct).mean,
        "ppo_accuracy_greedy": share(outcome.greedy[1].correct).mean,
        "sft_score": mean(outcome.sampled[0].scores).mean,
        "ppo_score": mean(outcome.sampled[1].scores).mean,
        "problems": len(outcome.prompts),
        "wall_s": wall_s,
        "seed": cfg.seed,
    }
    write_whole(cfg.run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
    page = _report(cfg, outcome, rows)
    _print_table(cfg, rows, page, wall_s)


def _table_rows(outcome: Outcome) -> list[tuple[str, Interval, Interval, Interval]]:
    sampled, greedy = outcome.sampled, outcome.greedy
    accuracy = [share(e.correct) for e in sampled]
    most_likely = [share(e.correct) for e in greedy]
    proxy = [mean(e.scores) for e in sampled]
    return [
        ("accuracy, sampled", accuracy[0], accuracy[1], paired_difference(sampled[0].correct, sampled[1].correct)),
        ("accuracy, greedy", most_likely[0], most_likely[1], paired_difference(greedy[0].correct, greedy[1].correct)),
        ("proxy reward, sampled", proxy[0], proxy[1], paired_difference(sampled[0].scores, sampled[1].scores)),
    ]


def _print_table(
    cfg: DemoConfig, rows: Sequence[tuple[str, Interval, Interval, Interval]], page: Path, wall_s: float
) -> None:
    table = Table(title=f"{cfg.problems} held-out problems, 95 % intervals", title_justify="left")
    for column in ("", "SFT", "PPO", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name, before, after, difference in rows:
        table.add_row(name, _spelled(before), _spelled(after), _spelled(difference, sign=True))
    console = Terminal() if sys.stdout.isatty() else Terminal(width=110)
    console.print(table)
    console.print(f"{wall_s:.0f} s on {cfg.layout.world_size} ranks, seed {cfg.seed}. Report: {page}")


def _spelled(interval: Interval, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{interval.mean:{plus}.3f} [{interval.low:{plus}.3f}, {interval.high:{plus}.3f}]"


def _report(cfg: DemoConfig, outcome: Outcome, rows: Sequence[tuple[str, Interval, Interval, Interval]]) -> Path:
    units = ("fraction", "fraction", "reward")
    summary = tuple(
        SummaryRow(name, before.mean, after.mean, *difference, unit=unit)
        for (name, before, after, difference), unit in zip(rows, units, strict=True)
    )
    before, after = outcome.sampled
    samples = tuple(
        SampleRow(
            prompt=outcome.prompts.columns[i]["prompt"],
            answer=outcome.prompts.answers[i],
            before=JudgedResponse(before.responses[i], float(before.scores[i]), bool(before.correct[i])),
            after=JudgedResponse(after.responses[i], float(after.scores[i]), bool(after.correct[i])),
        )
        for i in range(min(cfg.samples, len(outcome.prompts)))
    )
    report = Report(
        title="PPO on arithmetic word problems",
        subtitle=f"{cfg.model}, {len(outcome.prompts)} held-out problems, seed {cfg.seed}, "
        f"{cfg.layout.world_size} ranks. Responses below are sampled at temperature 1.",
        summary=summary,
        samples=samples,
        stages=(("Supervised fine-tuning", "sft"), ("Reward model", "reward")),
        main="ppo",
    )
    return write_report(cfg.run_dir, report)
