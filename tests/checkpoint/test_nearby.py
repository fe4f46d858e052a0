"""A path near a model is refused with the right one, which then is taken, at every door."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarlhf.checkpoint.hf_convert import to_hf, to_megatron
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.checkpoint.nearby import check_place
from megarlhf.errors import CheckpointError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with states, an unfinished one, a demo of two stages, and a Hugging Face directory in a folder."""
    files = (
        *("done/model/model.json", "done/model/weights/a.distcp", "done/model/tokenizer/tokenizer.json"),
        *("done/metrics.jsonl", "done/checkpoints/latest", "done/checkpoints/step_00000004/state.json"),
        *("begun/checkpoints/latest", "begun/checkpoints/step_00000002/state.json"),
        *("demo/ppo/model/model.json", "demo/sft/model/model.json"),
        *("hf/llama/config.json", "hf/llama/original/params.json"),
    )
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MEANT = [
    *((path, "done/model") for path in ("done", "done/", "done/modle", "done/model/model.json", "done/metrics.jsonl")),
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


@pytest.mark.parametrize(
    "state", ["checkpoints", "checkpoints/latest", "checkpoints/step_00000004", "checkpoints/best"]
)
def test_a_state_is_no_model_but_its_run_may_have_one(state: str, tree: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is what a run goes on from, not a model; name done/model\.$"):
        describe_model(f"done/{state}")
    state = state.replace("4", "2")
    with pytest.raises(CheckpointError, match=r"; the model will be in begun/model once the run is finished\.$"):
        describe_model(f"begun/{state}")


def test_a_hub_name_is_said_to_be_perhaps_one(tree: Path) -> None:
    remedy = r"\(hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B\) and name Llama-3.2-1B\.$"
    with pytest.raises(CheckpointError, match=f"if it is a name on the Hugging Face Hub, have it here first {remedy}"):
        describe_model("meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize("path", ["nowhere", "done/nowhere/at/all", "tiny-xl"])
def test_of_other_paths_nothing_is_guessed(path: str, tree: Path) -> None:
    check_place(path, "model.json")


def test_the_converter_names_it_too(tree: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^model 'done' is no model directory; did you mean done/model\?$"):
        to_hf(Path("done"), Path("out"))
    with pytest.raises(CheckpointError, match=r"^model 'hf' is no model directory; did you mean hf/llama\?$"):
        to_megatron(Path("hf"), Path("out"))
