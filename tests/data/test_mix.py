"""Several sources with weights: an epoch has them by their weights, leaves no row out, and says what it is made of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from megarlhf.config import load_config
from megarlhf.data.arithmetic import words
from megarlhf.data.prompts import load_prompts
from megarlhf.data.rows import DataConfig, shares
from megarlhf.data.sft import SftData, load_sft
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError, MegarlhfError
from megarlhf.trainers import grpo, sft
from tests.test_cli_runs import TIMEOUT_S, started


@pytest.fixture
def tokenizer() -> Tokenizer:
    return build_tiny_tokenizer(words())


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> dict[str, dict]:
    """Twelve rows that name their columns as ours, and five that do not."""
    ours = written(tmp_path / "ours.jsonl", [{"prompt": f"{n} + 1", "answer": str(n + 1)} for n in range(1, 13)])
    theirs = written(tmp_path / "theirs.jsonl", [{"q": f"{n} - 1", "a": str(n - 1)} for n in range(1, 6)])
    return {"ours": {"source": ours}, "theirs": {"source": theirs, "columns": {"prompt": "q", "answer": "a"}}}


@pytest.mark.parametrize(
    ("rows", "weights", "entries"),
    [
        ((12, 5), (1, 1), (12, 12)),
        ((12, 5), (3, 1), (15, 5)),
        ((12, 5), (0.75, 0.25), (15, 5)),  # shares count, not their sum
        ((12, 5), (12, 5), (12, 5)),
        ((10, 10, 10), (0.7, 0.2, 0.1), (70, 20, 10)),
        ((1000, 1), (1, 0.25), (1000, 250)),
    ],
)
def test_an_epoch_has_the_parts_by_weight_and_every_row(
    rows: tuple[int, ...], weights: tuple[float, ...], entries: tuple[int, ...]
) -> None:
    names = "abc"[: len(rows)]
    found = shares(dict(zip(names, rows, strict=True)), dict(zip(names, weights, strict=True)))
    assert tuple(found.values()) == entries
    assert all(found[name] >= count for name, count in zip(names, rows, strict=True))


def test_prompts_of_two_sources(two: dict, tokenizer: Tokenizer) -> None:
    two["theirs"]["weight"] = 2.0
    prompts = load_prompts(DataConfig.model_validate({"mix": two, "template": "plain"}), tokenizer)
    assert (len(prompts), prompts.distinct) == (36, 17)
    seen = Counter(prompts.ids)
    assert [seen[at] for at in range(12)] == [1] * 12
    assert [seen[at] for at in range(12, 17)] == [5, 5, 5, 5, 4]
    batch = prompts.batch(torch.tensor([0, 11, 12, 35]))
    assert [row["prompt"] for row in prompts.columns_in(batch.ids)] == ["1 + 1", "12 + 1", "1 - 1", "4 - 1"]
    assert batch.answers == ("2", "13", "0", "3")


def test_what_is_dropped_has_no_share(two: dict, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Bad rows and long ones first, then the weights; ids count rows of the file, as messages do."""
    long = {"prompt": "1 + 1 + 1 + 1 + 1 + 1", "answer": "6"}
    rows = [{"prompt": ""}, long, {"prompt": "2 + 2", "answer": "4"}]
    two["ours"]["source"] = written(tmp_path / "some.jsonl", rows)
    asked = {"mix": two, "template": "plain", "max_tokens": 8, "bad_rows": "drop", "overlong": "drop"}
    prompts = load_prompts(DataConfig.model_validate(asked), tokenizer)
    assert list(prompts.ids) == [2] * 5 + [3, 4, 5, 6, 7]
    assert prompts.dropped == 1
    assert {name: tuple(share) for name, share in prompts.origin.mix.items()} == {"ours": (1, 5), "theirs": (5, 5)}
    assert len(prompts.origin.bad) == 1


def test_every_part_has_its_own_shape(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = {
        "instruct": [{"instruction": "1 + 1", "input": "", "output": "2"}],
        "completions": [{"prompt": "2 + 2", "completion": "4"}],
        "arithmetic": [],
    }
    mix = {name: {"source": written(tmp_path / f"{name}.jsonl", rows)} for name, rows in parts.items() if rows}
    mix["arithmetic"] = {"source": "arithmetic"}
    asked = {"mix": mix, "template": "plain", "arithmetic": {"level": 1, "rows": 4}}
    rows = load_sft(SftData.model_validate(asked), tokenizer)
    assert {name: tuple(share) for name, share in rows.origin.mix.items()} == {
        "instruct": (1, 4),
        "completions": (1, 4),
        "arithmetic": (4, 4),
    }
    assert rows.origin.shape.startswith("instruct: ")
    assert "; completions: " in rows.origin.shape


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["prompts.source=x.jsonl"],
            "prompts.source=x.jsonl and prompts.mix: each of the mix has its own source; leave",
        ),
        (["prompts.split=heldout"], "prompts.split=heldout and prompts.mix: each of the mix has its own split; leave"),
        (["prompts.columns.prompt=q"], "prompts.columns={'prompt': 'q'} and prompts.mix: each of the mix has its own"),
        (["prompts.mix={}", "prompts.source=y.jsonl"], "data file does not exist: y.jsonl"),
        (["prompts.mix.more.weight=2"], "prompts.mix.more.source is empty; name a file"),
        (["prompts.mix.ours.weight=1e-5"], "would be 1,200,000 of an epoch; none may be there more than 1,000 times"),
        (["prompts.mix.ours.source=nowhere.jsonl"], "data file does not exist: nowhere.jsonl; check the path"),
        (
            ["prompts.mix.ours.wait=2"],
            "unknown setting prompts.mix.ours.wait = 2 (from the command line); did you mean",
        ),
        (["prompts.mix.ours.weight=0"], "setting prompts.mix.ours.weight = 0: input should be greater than 0"),
        (["prompts.mix.ours.columns.answer=none"], "prompts.mix.ours.columns.answer"),
        (["prompts.max_tokens=3"], "17 of 17 in "),
        (["prompts.max_tokens=3", "prompts.overlong=drop"], "no row is left: all 12 of "),
    ],
)
def test_what_is_wrong_is_said_by_its_name(settings: list[str], said: str, two: dict, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    judge = {"judges": {"right": {"kind": "rule", "rule": "arithmetic"}}}
    file.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "actor": {"init": "tiny-xs"}, **judge}))
    mix = [f"prompts.mix.{name}={json.dumps(part)}" for name, part in two.items()]
    sizes = [
        "rollout_batch=4",
        "group_size=2",
        "global_batch=4",
        "micro_batch=4",
        "sampling.max_new_tokens=4",
        "tokenizer=arithmetic",
    ]
    with pytest.raises(MegarlhfError) as refused:
        grpo.TRAINER.prepare(load_config(grpo.GRPOConfig, file, [*mix, *sizes, *settings]))
    assert said in str(refused.value)
    assert "mean prompts.mix.ours.weight?" in str(refused.value) or "wait" not in settings[0]


def test_a_bad_row_names_its_file(two: dict, tokenizer: Tokenizer, tmp_path: Path) -> None:
    two["theirs"]["source"] = written(tmp_path / "bad.jsonl", [{"q": 3, "a": "1"}])
    with pytest.raises(
        DataError, match=r"bad\.jsonl, row 1, column 'q' \(prompts\.mix\.theirs\.columns\.prompt\)"
    ) as bad:
        load_prompts(DataConfig.model_validate({"mix": two, "template": "plain"}), tokenizer)
    assert "bad_rows=drop" not in str(bad.value)  # none would be left of it


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_mix_is_for_training(command: str, two: dict, tmp_path: Path) -> None:
    mix = [f"prompts.mix.{name}={json.dumps(part)}" for name, part in two.items()]
    done = started(command, "model=tiny-xs", "tokenizer=arithmetic", *mix, directory=tmp_path)
    _, said = done.communicate(timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "prompts.mix is for rows that are learnt from; set prompts.source, for each of them in turn." in said


def test_a_run_learns_from_a_mix_and_says_so(tmp_path: Path) -> None:
    """The command line alone, and as often as the weights say: two epochs of 4 + 4 rows in batches of 4."""

    written(tmp_path / "alpaca.jsonl", [{"instruction": "1 + 1", "input": "", "output": "2"}])
    written(tmp_path / "pairs.jsonl", [{"prompt": f"{n} + 2", "response": str(n + 2)} for n in range(4)])
    settings = ("run_dir=run", "model=tiny-xs", "tokenizer=arithmetic", "data.template=plain", "epochs=2")
    mix = ("data.mix.chat.source=alpaca.jsonl", "data.mix.chat.weight=0.5", "data.mix.pairs.source=pairs.jsonl")
    sizes = ("data.mix.pairs.weight=0.5", "global_batch=4", "micro_batch=2", "tensorboard=false")
    run = started("sft", *settings, *mix, *sizes, directory=tmp_path)
    _, said = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 0, said
    assert "data: alpaca.jsonl (train), pairs.jsonl (train), 8 rows, 0 dropped, " in said
    assert "data, chat: 50.0 % of an epoch, 4 rows, which are 1, each 4 times" in said
    assert "data, pairs: 50.0 % of an epoch, 4 rows, which are 4, each 1 times" in said
    assert "steps: 4, each of 4 rows" in said
    assert load_config(sft.SftConfig, tmp_path / "run" / "config.yaml", []).data.mix["chat"].weight == 0.5


def test_the_sources_are_those_of_the_run_that_goes_on(two: dict, tmp_path: Path) -> None:
    """Paths compare resolved, weights by value."""
    base = ["run_dir=run", "model=tiny-xs"]
    first = load_config(sft.SftConfig, None, [*base, f"data.mix={json.dumps(two)}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(first.to_yaml())
    again = first.model_copy(update={"run_dir": tmp_path / "run"})
    assert set(again.changes()) == {"run_dir"}
    two["ours"]["weight"] = 3.0
    other = load_config(sft.SftConfig, None, [*base, f"data.mix={json.dumps(two)}"])
    changed = other.model_copy(update={"run_dir": tmp_path / "run"}).changes()
    assert changed["data.mix.ours.weight"] == (1.0, 3.0)
    with pytest.raises(ConfigError):
        load_config(sft.SftConfig, None, [*base, "data.mix.ours.kind=x"])
