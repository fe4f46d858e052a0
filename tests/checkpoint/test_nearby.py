"""A path near a model is refused with the right one, which then is taken, at every door."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megarlhf.checkpoint.hf_convert import to_hf, to_megatron
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.checkpoint.nearby import check_place, model_of
from megarlhf.errors import CheckpointError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with states, an unfinished one, a demo of two stages, and a Hugging Face directory in a folder."""
    files = (
        *("done/model/model.json", "done/model/weights/a.distcp", "done/model/tokenizer/tokenizer.json"),
        *("done/metrics.jsonl", "done/config.yaml", "short/config.yaml", "short/model/model.json"),
        *(f"done/checkpoints/step_0000000{n}/{role}/model.json" for n in (2, 4) for role in ("actor", "critic")),
        *("begun/config.yaml", "begun/checkpoints/step_00000003/model/model.json"),
        *("old/config.yaml", "old/checkpoints/step_00000001/state.json", "odd/checkpoints/latest"),
        *(f"two/checkpoints/step_00000001/{role}/model.json" for role in ("twin", "teacher")),
        "two/config.yaml",
        *("demo/ppo/model/model.json", "demo/sft/model/model.json"),
        *("hf/llama/config.json", "hf/llama/original/params.json"),
    )
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "done/checkpoints/latest").write_text("step_00000004\n")
    (tmp_path / "done/checkpoints/best").write_text("step_00000002\n")
    (tmp_path / "odd/checkpoints/latest").write_text("../../done\n")
    (tmp_path / "done/checkpoints/step_00000007").symlink_to(tmp_path / "begun/checkpoints/step_00000003")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MEANT = [
    *((path, "done/model") for path in ("done/modle", "done/model/model.json", "done/metrics.jsonl")),
    *((path, "done/model") for path in ("done/model/weights", "done/model/weights/a.distcp", "done/model/tokenizer")),
    ("demo", "demo/ppo/model"),
    *((path, "hf/llama") for path in ("hf", "hf/llama/config.json", "hf/llama/original")),
]


@pytest.mark.parametrize(("path", "meant"), MEANT)
def test_the_model_near_by_is_named(path: str, meant: str, tree: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(path)
    assert str(refused.value) == f"model {path!r} is no model directory; did you mean {meant}?"
    check_place(meant, "model.json", "config.json")
    check_place(str(tree / meant), "model.json", "config.json")


TAKEN = [
    *((path, "done/model") for path in ("done", "done/")),
    ("short", "short/model"),  # of fewer steps than save_every
    *((f"done/checkpoints{rest}", "done/checkpoints/step_00000004/actor") for rest in ("", "/", "/latest", "/step_4")),
    ("done/checkpoints/best", "done/checkpoints/step_00000002/actor"),
    *((f"done/checkpoints/{name}", "done/checkpoints/step_00000002/actor") for name in ("step_00000002", "step_02")),
    ("done/checkpoints/step_00000002/critic", "done/checkpoints/step_00000002/critic"),
    *((path, "begun/checkpoints/step_00000003/model") for path in ("begun", "begun/checkpoints/latest")),
    *((path, path) for path in ("done/model", "hf/llama", "tiny-s", "nowhere", "demo", "done/metrics.jsonl", "")),
]


@pytest.mark.parametrize(("path", "model"), TAKEN)
def test_a_run_and_its_states_are_models(path: str, model: str, tree: Path) -> None:
    assert model_of(path) == model


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("done/checkpoints/step_3", "step_00000003 is not there; name one of done/checkpoints: step_00000002, step_00"),
        ("done/checkpoints/step_00000007", "step_00000007 is not there; name one of"),  # a link that leads out
        ("begun/checkpoints/best", "begun/checkpoints/best cannot be read: the run keeps none (keep_best); name one"),
        ("old", "of models old/checkpoints/step_00000001 has none; name one of old/checkpoints: step_00000001"),
        ("two", "step_00000001 has several, teacher, twin, and no actor; name one of"),
        (
            "odd/checkpoints/latest",
            "odd/checkpoints/latest names '../../done', which is no state; the model will be in",
        ),
    ],
)
def test_what_is_no_model_of_a_run_is_answered_with_what_is_one(path: str, says: str, tree: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(says)):
        model_of(path)


def test_a_hub_name_is_said_to_be_perhaps_one(tree: Path) -> None:
    remedy = r"\(hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B\) and name Llama-3.2-1B\.$"
    with pytest.raises(CheckpointError, match=f"if it is a name on the Hugging Face Hub, have it here first {remedy}"):
        describe_model("meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize("path", ["nowhere", "done/nowhere/at/all", "tiny-xl"])
def test_of_other_paths_nothing_is_guessed(path: str, tree: Path) -> None:
    check_place(path, "model.json")


def test_the_converter_names_it_too(tree: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^model 'demo' is no model directory; did you mean demo/ppo/model\?$"):
        to_hf(Path("demo"), Path("out"))
    with pytest.raises(CheckpointError, match=r"^model 'hf' is no model directory; did you mean hf/llama\?$"):
        to_megatron(Path("hf"), Path("out"))
