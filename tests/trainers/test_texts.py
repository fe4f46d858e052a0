"""What settings leave open is chosen where the choice is safe, said where it is made, and refused where it is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from megarlhf import cli
from megarlhf.commands import evaluate as command
from megarlhf.commands import generate
from megarlhf.commands.evaluate import EvalConfig
from megarlhf.commands.generate import GenerateConfig
from megarlhf.config import load_config
from megarlhf.data.tokenizer import LLAMA3_CHAT_TEMPLATE
from megarlhf.errors import ConfigError, DataError
from megarlhf.observe.provenance import write_provenance
from megarlhf.runtime.checks import Model
from megarlhf.runtime.said import DataSet, remarks, visible
from megarlhf.trainers import ppo
from megarlhf.trainers.policy_config import PolicyInputs
from megarlhf.trainers.policy_metrics import accuracy_metric
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.refusal import PPO, ModelWasBuiltError, assert_matches, write_model

Refused = Callable[..., str]
SMALL = ("global_batch=1", "micro_batch=1")
OWN = {
    "sft": ("sft", "model=own", "data.template=plain", *SMALL),
    "pairs": ("reward", "model=own", "pairs.template=plain", "pairs_batch=1", "micro_batch=1"),
    "labelled": ("reward", "model=own", "labelled.template=plain", "labelled_batch=2", "micro_batch=1"),
    "heldout": (
        *("reward", "model=own", "pairs.source=arithmetic", "pairs.arithmetic.rows=4", "pairs_batch=1"),
        *("micro_batch=1", "heldout.template=plain"),
    ),
    "ppo": ("ppo", "actor.init=own", "reward.init=tiny-xs", "rollout_batch=1", *SMALL, "sampling.max_new_tokens=4"),
    "doctor": (
        *("doctor", "actor.init=own", "reward.init=tiny-xs", "rollout_batch=1", *SMALL),
        "sampling.max_new_tokens=4",
    ),
    "eval": ("eval", "model=own", "sampling.max_new_tokens=4"),
    "generate": ("generate", "model=own", "sampling.max_new_tokens=4"),
}
"""Commands on a model of one's own, without a source of data."""
GROUPS = {"sft": "data", "ppo": "prompts", "doctor": "prompts", "eval": "prompts", "generate": "prompts"}


@pytest.mark.parametrize("case", OWN)
def test_no_data_is_assumed_for_a_model_of_ones_own(case: str, refused: Refused) -> None:
    write_model(Path("own"))
    group = GROUPS.get(case, case)
    setting = "actor.init" if case in ("ppo", "doctor") else "model"
    said = refused(OWN[case])
    assert_matches(
        said, f"{group}.source is empty, and {setting}=own is neither a preset nor was it trained on the built-in"
    )
    assert_matches(said, f"set {group}.source=arithmetic for that task.")
    # The remedy, word for word.
    rows = [f"{group}.source=arithmetic", f"{group}.arithmetic.rows=4"]
    assert_reaches_the_model([*OWN[case], *rows, *([] if case in ("eval", "generate") else ["run_dir=run"])])


def assert_reaches_the_model(command: Sequence[str]) -> None:
    with pytest.raises(ModelWasBuiltError):
        cli.main([*command])


def prompts_file(answers: Sequence[str | None]) -> str:
    rows = [{"prompt": "How many?"} | ({"answer": answer} if answer else {}) for answer in answers]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "prompts.source=own.jsonl"


def prepared(*changes: str) -> PolicyInputs:
    sizes = ("rollout_batch=2", "global_batch=2", "micro_batch=1")
    return ppo.TRAINER.prepare(load_config(PPOConfig, None, ["run_dir=run", *PPO[1:], *sizes, *changes]))


def test_only_the_built_in_task_has_a_verifier_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = prompts_file(["5", "6"])
    assert prepared().verifier == "arithmetic"
    assert prepared("verifier=none").verifier is None
    assert prepared(own).verifier is None
    assert prepared(own, "verifier=arithmetic").verifier == "arithmetic"


def test_the_first_rule_verifies_and_what_its_answers_lack_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = ("judges.a.kind=rule", "judges.a.rule=gsm8k")
    found = prepared(prompts_file(["5", "five"]), *first, "judges.b.kind=rule", "judges.b.rule=arithmetic")
    assert found.verifier == "gsm8k"
    one = "1 of 2 answers can be right for no response, for example 'five'"
    assert found.doubts == f"{one}; {one}"
    assert prepared(prompts_file(["5", "6"]), *first, "verifier=none").verifier is None
    with pytest.raises(
        DataError, match=r"own\.jsonl, row 2: judges\.a judges by the answer; fill the column 'answer'\."
    ):
        prepared(prompts_file(["5", None]), *first)
    with pytest.raises(ConfigError, match=r"^judges\.a\.rule=gsm8k: of own\.jsonl no answer can be right"):
        prepared(prompts_file(["five", "six"]), *first)


def test_eval_of_ones_own_prompts_needs_a_verifier(refused: Refused) -> None:
    write_model(Path("own"))
    own = prompts_file(["5"])
    said = refused(OWN["eval"], own)
    assert_matches(said, "verifier: there is none by default.*prompts.source=own.jsonl; set verifier=maths.*arithmetic")
    # A file has one split, so that none needs to be named.
    assert_reaches_the_model([*OWN["eval"], own, "verifier=arithmetic"])


def test_without_verdicts_there_is_no_accuracy_rather_than_none_right() -> None:
    assert accuracy_metric([True, None, False]) == {"rollout/accuracy": 0.5, "rollout/verified": 2}
    assert accuracy_metric([None, None]) == {}


def edit(directory: Path, **changes: object) -> None:
    """Change the backend of a saved tokenizer."""
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swapped(directory: Path) -> None:
    """Two words that change places: the size of the vocabulary stays."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"]
    vocabulary["apples"], vocabulary["books"] = vocabulary["books"], vocabulary["apples"]
    edit(directory, model=model)


def lowercase(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(directory / "tokenizer.json"))


def other_marker(directory: Path) -> None:
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    edit(directory, added_tokens=[token | ({"lstrip": True} if token["id"] == 2 else {}) for token in added])


def padded(directory: Path) -> None:
    """What decides no id: the order of keys, padding, and a flag for decoding."""
    found = json.loads((directory / "tokenizer.json").read_text())
    found["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    found["padding"] |= {"pad_id": 5, "pad_type_id": 0, "pad_token": "<|finetune_right_pad_id|>"}
    (directory / "tokenizer.json").write_text(json.dumps(dict(reversed(found.items())), indent=4))


SPOILT: dict[Callable[[Path], None], str] = {
    swapped: "vocabulary, id",
    lowercase: "normalizer",
    other_marker: "added token 2 lstrip",
}


@pytest.mark.parametrize("role", ["critic", "reference", "reward"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_roles_of_different_tokenizers_are_refused(spoil: Callable[[Path], None], role: str, refused: Refused) -> None:
    write_model(Path("own"))
    write_model(Path("other"), scalar=role == "reward")
    spoil(Path("other"))
    given = [part for part in PPO[1:] if not part.startswith(("actor.init", "tokenizer", f"{role}.init"))]
    said = refused(("ppo", "actor.init=own", "prompts.source=arithmetic", f"{role}.init=other", *given))
    assert_matches(said, f"actor.init=own (own) and {role}.init=other (other) have different tokenizers: ")
    assert_matches(said, SPOILT[spoil])
    assert_matches(said, "use models of one tokenizer, or copy the right tokenizer files over the wrong ones.")


def test_a_reward_model_that_reads_another_end_is_refused(refused: Refused) -> None:
    write_model(Path("own"))
    write_model(Path("other"), scalar=True)
    (Path("other") / "chat_template.jinja").unlink()
    path = Path("other/tokenizer_config.json")
    path.write_text(path.read_text().replace('"eos_token": "<|eot_id|>"', '"eos_token": "<|end_of_text|>"'))
    given = [part for part in PPO[1:] if not part.startswith(("actor.init", "tokenizer", "reward.init"))]
    said = refused(("ppo", "actor.init=own", "prompts.source=arithmetic", "reward.init=other", *given))
    assert_matches(said, "a response ends with '<|eot_id|>' in the first and with '<|end_of_text|>' in the second")


def ppo_of(actor: str, reward: str, *changes: str) -> PPOConfig:
    given = [part for part in PPO[1:] if not part.startswith(("actor.init", "critic.init", "tokenizer"))]
    inits = [f"actor.init={actor}", f"critic.init={reward}", "prompts.source=arithmetic", "run_dir=run"]
    return load_config(PPOConfig, None, [*given, *inits, *changes])


def test_cosmetic_differences_of_tokenizers_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("own", "other"):
        write_model(Path(name))
    padded(Path("other"))
    assert ppo.TRAINER.prepare(ppo_of("own", "other")).tokenizer.source == "own"


def test_a_tokenizer_given_by_hand_is_the_model_s_own(refused: Refused) -> None:
    for name in ("own", "other"):
        write_model(Path(name))
    swapped(Path("other"))
    given = ("data.source=arithmetic", "data.arithmetic.rows=4", *SMALL)
    said = refused(("sft", "model=own", "tokenizer=other", *given))
    assert_matches(said, "tokenizer=other (other) and model=own (own) have different tokenizers: vocabulary, id")
    # The model's own by another name is no difference; this too stops only where the model would be built.
    assert_reaches_the_model(["sft", "model=own", "tokenizer=arithmetic", *given, "run_dir=run"])


def dated(directory: Path) -> Path:
    """A model whose template tells it the day of the month, as Llama 3.2's tells the date."""
    write_model(directory)
    llama = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%-d') %}{%- endif %}"
    (directory / "chat_template.jinja").write_text(f"{llama}{{{{ date_string }}}} {LLAMA3_CHAT_TEMPLATE}")
    return directory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set the local clock east or west: 26 hours apart, so that it is never the same day there."""

    def move(zone: str) -> None:
        monkeypatch.setenv("TZ", {"west": "AAA+12", "east": "BBB-14"}[zone])
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


def test_a_run_sees_the_same_prompts_after_midnight(
    clock: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dated(Path("own"))
    cfg = ppo_of("own", "own", "prompts.template=chat")
    clock("west")
    first = ppo.TRAINER.prepare(cfg)
    clock("east")
    assert ppo.TRAINER.prepare(cfg).prompts.tokens != first.prompts.tokens, "the template does not tell the day"
    # What a run writes when it starts.
    write_provenance(cfg.run_dir, cfg.pinned(first.tokenizer.date), [])
    (cfg.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert ppo.TRAINER.prepare(cfg).prompts.tokens == first.prompts.tokens
    with pytest.raises(ConfigError, match=r"other settings .*date"):
        ppo.TRAINER.prepare(load_config(PPOConfig, None, [*_overrides(cfg), "date=2001-02-03"]))


def _overrides(cfg: PPOConfig) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in cfg.model_dump(mode="json").items() if name != "date"]


def test_the_date_is_told_and_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dated(Path("own"))
    cfg = load_config(
        GenerateConfig, None, ["model=own", "prompt=How many?", "date=2026-03-05", "sampling.max_new_tokens=4"]
    )
    inputs = generate.prepare(cfg)
    assert inputs.tokenizer.decode_all(inputs.prompts.tokens[0]).startswith("5 <|begin_of_text|>")
    sets = [DataSet("prompts", cfg.prompts, inputs.data, inputs.prompts)]
    assert (
        "the chat template is told that it is 2026-03-05"
        in remarks(sets, inputs.tokenizer, Model("model", "own", inputs.model))[-1]
    )


def trained_with(template: str, directory: Path) -> None:
    """A Hugging Face directory as `to-hf` writes it of a model that was trained so."""
    write_model(directory)
    config = json.loads((directory / "config.json").read_text())
    told = {"score_offset": 0.0, "score_scale": 1.0, "score_wrong": None, "template": template, "task": "arithmetic"}
    (directory / "config.json").write_text(json.dumps({**config, "megarlhf": told}))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_template_is_the_model_s(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained_with(template, Path("own"))
    other = {"chat": "plain", "plain": "chat"}[template]
    sizes = ["model=own", "prompts.arithmetic.rows=4", "sampling.max_new_tokens=4"]
    cfg = load_config(EvalConfig, None, sizes)
    inputs = command.prepare(cfg)
    assert (inputs.data.template, inputs.data.source, inputs.data.split) == (template, "arithmetic", "heldout")
    explicit = load_config(EvalConfig, None, [*sizes, f"prompts.template={other}"])
    changed = command.prepare(explicit)
    assert (changed.data.template, changed.tokenizer.source) == (other, "own")
    assert len(changed.prompts.tokens[0]) - len(inputs.prompts.tokens[0]) == {"chat": -9, "plain": 9}[template]
    sets = [DataSet("prompts", explicit.prompts, changed.data, changed.prompts)]
    said = remarks(sets, changed.tokenizer, Model("model", "own", changed.model))
    assert said == [
        "prompts.source is empty: the built-in task is taken, since model=own was trained on it",
        f"prompts.template is {other}, but model=own was trained with {template}",
    ]


def test_what_is_said_of_data_cannot_move_the_cursor() -> None:
    assert visible("a\x1b[2Jb\n\u202ec é ✓ [red]") == "a\\x1b[2Jb\\n\\u202ec é ✓ [red]"
