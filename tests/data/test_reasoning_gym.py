"""Runs whose problems reasoning-gym makes: trained on, stopped, gone on with, evaluated, and written out."""

from __future__ import annotations

import json
import shlex
import signal
import string
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megarlhf.commands import evaluate
from megarlhf.config import load_config
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer, load_tokenizer
from megarlhf.judges.gym import check_gym, gym_score
from megarlhf.trainers import grpo
from tests.test_cli_runs import TIMEOUT_S, started

pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed: pip install -e '.[tasks]'")

SUMS = (
    *("prompts.source=reasoning_gym:chain_sum", "prompts.template=plain", 'prompts.reasoning_gym.instruction=""'),
    "prompts.reasoning_gym.parameters.max_terms=3",
)
GRPO = (
    *("grpo", "run_dir=run", "actor.init=tiny-xs", "tokenizer=letters", "layout.data=2", "save_every=1", *SUMS),
    *("judges.answer.kind=rule", "judges.answer.rule=reasoning_gym", "prompts.reasoning_gym.rows=64"),
    *("iterations=3", "rollout_batch=16", "group_size=4", "global_batch=8", "micro_batch=4"),
    "sampling.max_new_tokens=6",
)


def letters(directory: Path) -> Tokenizer:
    """A tokenizer of printable ASCII, a token a character, saved to `directory`."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    entries = [*special, *string.printable[:95], "\n"]
    backend = Backend(models.WordLevel({entry: at for at, entry in enumerate(entries)}, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    bos, eos, pad = special
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)
    return load_tokenizer(directory)


def megarlhf(*arguments: str, directory: Path, code: int = 0, stopped_when: Path | None = None) -> tuple[str, str]:
    """What the command line said on both streams; it is sent SIGTERM as soon as `stopped_when` has a line."""
    with started(*arguments, directory=directory) as process:
        try:
            while stopped_when and not (stopped_when.exists() and stopped_when.read_text()) and process.poll() is None:
                time.sleep(0.05)
            if stopped_when:
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == code, err
    return out, err


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a run was stopped and gone on with, and what it said at its end."""
    directory = tmp_path_factory.mktemp("sums")
    letters(directory / "letters")
    megarlhf(*GRPO, directory=directory, code=75, stopped_when=directory / "run/metrics.jsonl")
    _, err = megarlhf(*GRPO, directory=directory)
    return directory, err


def test_a_run_is_judged_by_the_verifier_and_goes_on_as_if_it_had_not_stopped(trained: tuple[Path, str]) -> None:
    directory, said = trained
    assert "goes on after step" in said
    assert "verifier: reasoning_gym, of all 64 prompts" in said
    megarlhf(*GRPO, "run_dir=whole", directory=directory)
    stopped, whole = (rows(directory / run / "metrics.jsonl") for run in ("run", "whole"))
    timed = ("time/", "throughput/", "memory/")
    kept = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in run] for run in (stopped, whole)]
    assert kept[0] == kept[1]
    assert [row["rollout/verified"] for row in stopped] == [16.0] * 3, "every response, whatever it says"


def test_what_is_said_to_come_next_evaluates_what_was_held_out_of_the_same_problems(trained: tuple[Path, str]) -> None:
    directory, said = trained
    (following,) = (line for line in said.splitlines() if line.startswith("next: "))
    command = shlex.split(following.removeprefix("next: megarlhf ").partition(", or ")[0])
    few = ("prompts.reasoning_gym.rows=8", "output=heldout.jsonl")
    megarlhf(*command, *few, directory=directory)
    asked = {row["prompt"] for row in rows(directory / "heldout.jsonl")}
    trained_on = load_config(grpo.GRPOConfig, directory / "run/config.yaml", []).prompts
    tokenizer = load_tokenizer(directory / "letters")
    held_out = trained_on.model_copy(update={"split": "heldout"})
    assert asked == {columns["prompt"] for columns in load_prompts(held_out, tokenizer).columns[:8]}
    assert not asked & {columns["prompt"] for columns in load_prompts(trained_on, tokenizer).columns}


def test_no_setting_of_the_problems_is_lost_on_the_way() -> None:
    odd = {"parameters": {"operators": ["+", "it's"], "n": 3, "sure": True, "s": "1"}, "instruction": 'Say "it":\n\té'}
    cfg = grpo.GRPOConfig.model_validate(
        {"run_dir": "run", "prompts": {"source": "reasoning_gym:x", "reasoning_gym": odd}}
    )
    evaluated = shlex.split(grpo.TRAINER.following(cfg)[0])
    assert evaluated[:2] == ["megarlhf", "eval"]
    again = load_config(evaluate.EvalConfig, None, evaluated[2:])
    assert again.prompts == cfg.prompts


def prompts_of(task: str, directory: Path, count: int) -> PromptSet:
    problems = {"rows": count, "instruction": ""}
    data = DataConfig.model_validate(
        {"source": f"reasoning_gym:{task}", "template": "plain", "reasoning_gym": problems, "max_tokens": 4096}
    )
    return load_prompts(data, letters(directory))


def test_the_right_answer_may_be_nothing(tmp_path: Path) -> None:
    """Of `ab`, whose programs may come to nothing."""
    prompts = prompts_of("ab", tmp_path, 20)
    assert "" in prompts.answers
    nothing = prompts.columns[list(prompts.answers).index("")]
    assert [gym_score(response, nothing) for response in ("<answer></answer>", "<answer>A#</answer>")] == [1.0, 0.0]
    assert check_gym(prompts, "reasoning_gym:ab", "judges.a.rule") == ""


def test_what_a_generator_prints_is_not_among_the_rows_of_a_command(tmp_path: Path) -> None:
    """`bf` runs its programs, which print."""
    letters(tmp_path / "letters")
    out, _ = megarlhf(
        *(
            "generate",
            "model=tiny-xs",
            "tokenizer=letters",
            "prompts.source=reasoning_gym:bf",
            "prompts.template=plain",
        ),
        *("prompts.reasoning_gym.rows=8", 'prompts.reasoning_gym.instruction=""', "sampling.max_new_tokens=2"),
        *("prompts.overlong=drop", "prompts.max_tokens=250"),
        directory=tmp_path,
    )
    assert out
    assert all(json.loads(line)["prompt"] for line in out.splitlines())
