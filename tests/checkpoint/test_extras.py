"""What a Hugging Face directory says beside its weights survives training and both conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron
from megarlhf.checkpoint.model_directory import Card, describe_model, load_model, save_model
from megarlhf.data.rows import DataConfig
from megarlhf.errors import CheckpointError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime.checks import Model, resolve_tokenizer
from tests.helpers.models import settings
from tests.helpers.ranks import run_ranks
from tests.helpers.refusal import write_model

ENDS = [4, 7, 9]
"""4 is the end of a turn in the tiny tokenizer."""
GENERATION = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [*ENDS, 11]}


def source(directory: Path, ends: object, generation: object) -> Path:
    """A Hugging Face directory that names these ends."""
    write_model(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def train(init: str, target: str, data: DataConfig) -> None:
    """Load, and save as training does."""
    model = Model("model", init, describe_model(init))
    mesh = start(ParallelLayout(), seed=1)
    role = FrozenRole("model", model.description.spec, "language", LabelLogprobs(1.0), settings(mesh), mesh)
    load_model(role, init, seed=1)
    save_model(role, Path(target), Card(resolve_tokenizer("", model), data, init))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_ends_and_generation_survive_two_trainings_and_both_conversions(tmp_path: Path) -> None:
    hf = source(tmp_path / "hf", ENDS, GENERATION)
    data = DataConfig(source="arithmetic", template="plain")
    run_ranks(train, 1, str(hf), str(tmp_path / "one"), data)
    run_ranks(train, 1, str(tmp_path / "one"), str(tmp_path / "two"), data)
    quiet = Options(progress=False)
    to_hf(tmp_path / "two", tmp_path / "back", quiet)
    to_megatron(tmp_path / "back", tmp_path / "three", quiet)
    to_hf(tmp_path / "three", tmp_path / "again", quiet)
    for directory in (tmp_path / "back", tmp_path / "again"):
        assert read(directory / "config.json")["eos_token_id"] == ENDS
        assert read(directory / "generation_config.json") == GENERATION
    for directory in ("hf", "one", "two", "back", "three", "again"):
        found = describe_model(str(tmp_path / directory))
        assert set(found.eos_ids) == {*ENDS, 11}
        # What it was trained on is known from the first training on.
        expected = (None, "") if directory == "hf" else ("plain", "arithmetic")
        assert (found.template, found.task) == expected


def test_an_end_that_was_taught_is_added_to_those_of_the_source(tmp_path: Path) -> None:
    hf = source(tmp_path / "hf", 9, {"eos_token_id": [9], "top_k": 5})
    run_ranks(train, 1, str(hf), str(tmp_path / "one"), DataConfig(source="own.jsonl", template="chat"))
    to_hf(tmp_path / "one", tmp_path / "back", Options(progress=False))
    assert read(tmp_path / "back" / "config.json")["eos_token_id"] == [9, 4]
    assert read(tmp_path / "back" / "generation_config.json") == {"eos_token_id": [9, 4], "top_k": 5}
    assert (describe_model(str(tmp_path / "back")).template, describe_model(str(tmp_path / "one")).task) == ("chat", "")


@pytest.mark.parametrize("ends", ["4", True, [4, None], 4.0, -1, {"id": 4}])
def test_ends_that_are_no_ids_are_refused(ends: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: eos_token_id=.* is neither a token id nor a list of them"):
        describe_model(str(source(tmp_path / "a", ends, {})))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id=.* is neither a token id"):
        describe_model(str(source(tmp_path / "b", 4, {"eos_token_id": ends})))
