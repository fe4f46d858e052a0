"""`megarlhf eval`: accuracy of a model on held-out problems, sampled and greedy, with intervals."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from rich.table import Table

from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.data.prompts import PromptSet, check_answered, load_prompts
from megarlhf.data.rows import PROGRAMS, DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.eval.accuracy import Evaluation, evaluate
from megarlhf.eval.intervals import mean, share
from megarlhf.judges.code_tests import CodeTestsConfig, SandboxedTests
from megarlhf.judges.rules import RuleConfig, check_verified
from megarlhf.judges.texts import Reader
from megarlhf.judges.verifiers import AutoVerifier, Decider, chosen_verifier
from megarlhf.models.readings import LabelLogprobs
from megarlhf.observe.evaluation import Decoding, page_of, write_evaluation
from megarlhf.observe.files import json_line, write_whole
from megarlhf.observe.samples import Rollout, prompt_of
from megarlhf.observe.terminal import Terminal
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig, check_drawn_by, check_rolls_out
from megarlhf.runtime.about import about
from megarlhf.runtime.checks import (
    Model,
    check_budget,
    check_room,
    check_same_tokenizer,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import check_new_file, lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen
from megarlhf.runtime.said import DataSet, ends, remarks, say, say_data
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, chosen_heldout


class EvalConfig(RanksConfig):
    """`megarlhf eval`: how often a policy is right."""

    first: ClassVar[tuple[str, ...]] = (
        *("model", "prompts.source", "verifier", "reward", "sampling.temperature", "sampling.max_new_tokens"),
        *("output", "micro_batch", "layout.data", "layout.tensor"),
    )
    needed: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    """The policy: a model directory, Hugging Face or megarlhf."""
    reward: str = ""
    """Reward model whose mean score is reported too; empty for none."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    prompts: DataConfig = DataConfig()
    """Problems: columns prompt and answer, or what verifier=code_tests reads."""
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    """How the sampled responses are drawn: at temperature 1, the policy itself, unless you say. The greedy ones are as
    long, at 0."""
    rollout: RolloutConfig = RolloutConfig()
    """How much is drawn at once."""
    verifier: AutoVerifier | Literal["code_tests"] = "auto"
    """What decides that a response is right: its last sentence, digit for digit, as the built-in task has it
    (`arithmetic`), a number (`gsm8k`), mathematics by math-verify (`maths`), all of its text (`exact`), what the
    verifier of its problem's task takes (`reasoning_gym`), or that the program in it passes all tests of its row, in a
    sandbox (`code_tests`). `auto` is arithmetic for the built-in task, code_tests for the built-in programs,
    reasoning_gym for that package's problems; for your own data one must be named."""
    code_tests: SandboxedTests = SandboxedTests()
    """How programs are run with verifier=code_tests."""
    output: Path | None = None
    """JSON lines file to write, one response a line, which appears once all are judged; any that exists is refused.
    null keeps none. Beside it comes a page, OUTPUT.html."""


@dataclass(frozen=True)
class EvalInputs:
    """Everything that was read and checked before a model is built."""

    model: ModelDescription
    reward: ModelDescription | None
    tokenizer: Tokenizer
    data: DataConfig
    prompts: PromptSet
    verifier: Decider
    judge: RuleConfig | CodeTestsConfig
    """It, with its settings."""
    doubts: str
    """What is to be said of answers that are right for no response."""

    def data_set(self, cfg: EvalConfig) -> DataSet:
        """The problems, as a start says them."""
        return DataSet("prompts", cfg.prompts, self.data, self.prompts)


def prepare(cfg: EvalConfig) -> EvalInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    if cfg.output is not None:
        check_new_file(cfg.output)
        check_new_file(page_of(cfg.output))
    check_rolls_out(cfg.layout, cfg.rollout, offload=cfg.offload, fp8=cfg.compute.fp8 != "off")
    if cfg.sampling.temperature == 0:
        raise ConfigError(
            "sampling.temperature=0: greedy responses are measured anyway, beside sampled ones; set it above 0."
        )
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    check_drawn_by(model.spec, cfg.layout, cfg.rollout, "model")
    reward = checked_model(cfg.reward, cfg.layout, "reward") if cfg.reward else None
    policy = Model("model", cfg.model, model)
    tokenizer = resolve_tokenizer(cfg.tokenizer, policy, cfg.date)
    if reward is not None:
        check_same_tokenizer(tokenizer, str(policy), Model("reward", cfg.reward, reward))
    data = chosen_heldout(cfg.prompts, "prompts", policy)
    verifier = _verifier(cfg, data.source)
    prompts = load_prompts(data, tokenizer)
    if verifier not in ("reasoning_gym", "code_tests"):
        check_answered(prompts, data.source, "no answer to check against")
    for name, found in (("model", model), ("reward", reward)):
        if found is not None:
            check_tokenizer(tokenizer, found.spec, name)
            check_room(prompts.longest, cfg.sampling.max_new_tokens, found.spec, name)
    if reward is not None:
        check_budget("a prompt with its response", prompts.longest + cfg.sampling.max_new_tokens, cfg)
    if verifier == "code_tests":
        judge = CodeTestsConfig(kind="code_tests", reward="all", **dict(cfg.code_tests))
        doubts = judge.check("code_tests", prompts, data.source)
    else:
        judge = RuleConfig(kind="rule", rule=verifier)
        doubts = check_verified(prompts, verifier, data.source)
    return EvalInputs(model, reward, tokenizer, data, prompts, verifier, judge, doubts)


def _verifier(cfg: EvalConfig, source: str) -> Decider:
    if cfg.verifier == "code_tests" or (cfg.verifier == "auto" and source == PROGRAMS):
        return "code_tests"
    verifier = chosen_verifier(cfg.verifier, source)
    if verifier is None:
        raise ConfigError(
            f"verifier: there is none by default for data of your own, here prompts.source={source}; set "
            "verifier=maths (answers equal as mathematics), verifier=arithmetic (responses that end in 'The answer "
            "is N.') or verifier=code_tests (programs that pass the tests of their row)."
        )
    return verifier


def main(cfg: EvalConfig, argv: Sequence[str]) -> int:
    """`megarlhf eval`."""
    return on_ranks(cfg, argv, prepare, partial(_run, shlex.join(["megarlhf", *argv])))


def _run(command: str, cfg: EvalConfig, inputs: EvalInputs, mesh: Mesh) -> None:
    check_one_day(inputs.tokenizer, mesh)
    with nullcontext() if cfg.output is None else sole_writer(lock_of_file(cfg.output), "output", cfg.output, mesh):
        results = _evaluate(cfg, inputs, mesh)
        if mesh.is_main:
            _report(cfg, inputs, results)
            if cfg.output is not None:
                _write(cfg.output, inputs, results)
                _write_page(cfg, cfg.output, inputs, results, command, mesh)


def _evaluate(cfg: EvalConfig, inputs: EvalInputs, mesh: Mesh) -> dict[str, Evaluation]:
    speaker = Model("model", cfg.model, inputs.model)
    policy = frozen("policy", speaker, LabelLogprobs(cfg.sampling.temperature), cfg, mesh)
    sets = [inputs.data_set(cfg)]
    readers = [Model("reward", cfg.reward, inputs.reward)] if inputs.reward else []
    said = remarks(sets, inputs.tokenizer, speaker, readers)
    say_data(sets, inputs.tokenizer, mesh, epochs={})
    say([*said, ends(inputs.tokenizer), f"verifier: {inputs.verifier}", *filter(None, [inputs.doubts])], mesh)
    reward = None
    for judge in readers:
        scores = judge.description.scores()
        reward = frozen("reward", judge, scores, cfg, mesh)
    reader = Reader(inputs.prompts, inputs.tokenizer, mesh, cfg.timeout_s)
    scorer = inputs.judge.scorer(inputs.verifier, reader)
    return {
        name: evaluate(
            policy,
            reward,
            reader,
            scorer,
            sampling,
            rollout=cfg.rollout,
            seed=cfg.seed,
        )
        for name, sampling in _samplings(cfg).items()
    }


def _samplings(cfg: EvalConfig) -> dict[str, SamplingConfig]:
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    return {"sampled": cfg.sampling, "greedy": cfg.sampling.model_copy(update=greedy)}


def _report(cfg: EvalConfig, inputs: EvalInputs, results: dict[str, Evaluation]) -> None:
    table = Table(title=f"{cfg.model}, {len(inputs.prompts)} problems, 95 % intervals", title_justify="left")
    for column in ("responses", "accuracy", "mean score", "tokens", "cut"):
        table.add_column(column, justify="left" if column == "responses" else "right")
    for name, result in results.items():
        accuracy, score = share(result.correct), mean(result.scores)
        table.add_row(
            name,
            f"{accuracy.mean:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
            f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]" if cfg.reward else "-",
            f"{float(result.lengths.float().mean()):.1f}",
            f"{float((~result.terminated).float().mean()):.3f}",
        )
    Terminal().print(table)


def _write(path: Path, inputs: EvalInputs, results: dict[str, Evaluation]) -> None:
    rows = [
        {
            "prompt": inputs.prompts.columns[index]["prompt"],
            "answer": inputs.prompts.answers[index],
            "decoding": name,
            "response": text,
            "correct": bool(result.correct[index]),
            "score": float(result.scores[index]),
        }
        for name, result in results.items()
        for index, text in enumerate(result.responses)
    ]
    write_whole(path, "".join(map(json_line, rows)))


def _write_page(
    cfg: EvalConfig, output: Path, inputs: EvalInputs, results: dict[str, Evaluation], command: str, mesh: Mesh
) -> None:
    named = {"model": (cfg.model, inputs.model), "reward": (cfg.reward, inputs.reward)}
    models = {role: Model(role, init, found) for role, (init, found) in named.items() if found is not None}
    said = about(cfg, models, [inputs.data_set(cfg)], mesh, epochs={}, steps=0)
    ways = [
        Decoding(
            name,
            share(result.correct),
            mean(result.scores) if cfg.reward else None,
            float(result.lengths.float().mean()),
            float((~result.terminated).float().mean()),
            [
                Rollout(
                    prompt_of(inputs.prompts.columns[index]["prompt"]) or "",
                    text,
                    inputs.prompts.answers[index],
                    float(result.scores[index]) if cfg.reward else None,
                    bool(result.correct[index]),
                )
                for index, text in enumerate(result.responses)
            ],
        )
        for name, result in results.items()
    ]
    page = page_of(output)
    write_evaluation(page, cfg.model, inputs.verifier, command, said, ways)
    Terminal(stderr=True, soft_wrap=True).print(f"the responses are in {output}, the page is {page}")
