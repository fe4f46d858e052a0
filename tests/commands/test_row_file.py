"""What must be true of an output before a command goes on with it: the same files behind the same names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megarlhf.checkpoint.hf_convert import Options, to_megatron
from megarlhf.commands import score
from megarlhf.commands.row_file import BLOCK, BLOCKS, content
from megarlhf.commands.score import Rendering, ScoreConfig
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import ConfigError
from tests.helpers.models import language_model
from tests.trainers.test_texts import dated

GOOD = {"prompt": "Tom has 5 apples.", "response": "The answer is 5."}


@pytest.mark.parametrize("setting", ["model", "tokenizer"])
def test_a_directory_that_was_made_anew_in_its_place_is_not_gone_on_with(setting: str, tmp_path: Path) -> None:
    """Same path, same shapes and sizes; other weights, or another vocabulary."""
    place, rows, output = tmp_path / "place", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    for name, seed in (("place", 1), ("other", 3)):
        language_model(tmp_path / name, seed=seed, vocab_size=161, max_position_embeddings=128)
    build_tiny_tokenizer(words()).save(place)
    rows.write_text(f"{json.dumps(GOOD)}\n" * 2)
    output.write_text(json.dumps({**GOOD, "logprobs": [-1.0], "logprob_sum": -1.0}) + "\n")
    given = {"model": "tiny-xs", "tokenizer": "arithmetic", setting: str(place)}
    cfg = ScoreConfig.model_validate({**given, "input": rows, "output": output})
    output.with_name("out.jsonl.settings.json").write_text(json.dumps(cfg.decisive()))
    inputs = score.prepare(cfg)
    assert inputs.output.done(inputs.rows.rows).rows == 1, "the same directory is gone on with"
    if setting == "model":
        shutil.copy(tmp_path / "other" / "model.safetensors", place)
    else:
        build_tiny_tokenizer([*words()[:-1], "zebra"]).save(place)
    with pytest.raises(ConfigError, match=rf"\({re.escape(setting)}'s content '\w+' -> '\w+'\); put them back"):
        score.prepare(cfg)


def test_rows_are_rendered_with_the_day_of_the_model_or_of_the_output_s_first_start(tmp_path: Path) -> None:
    """5 March is in model.json; without it the output that is gone on with says 3 February, whatever day it is now."""
    hf, rows, output = dated(tmp_path / "hf"), tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(f"{json.dumps(GOOD)}\n" * 2)

    def begins(model: str, **changes: str) -> str:
        given = {"model": str(tmp_path / model), "input": rows, "output": output, "prompts": {"template": "chat"}}
        inputs = score.prepare(ScoreConfig.model_validate_json(json.dumps({**given, **changes}, default=str)))
        return load_tokenizer(hf).decode_all(inputs.rows.batch([0]).tokens[0].tolist()).partition(" ")[0]

    config = json.loads((hf / "config.json").read_text())
    told = {"score_offset": 0.0, "score_scale": 1.0, "score_wrong": None, "date": "2026-03-05"}
    (hf / "config.json").write_text(json.dumps({**config, "megarlhf": told}))
    to_megatron(hf, tmp_path / "model", Options(progress=False))
    assert (begins("hf"), begins("model"), begins("model", date="2026-03-07")) == ("5", "5", "7")

    (hf / "config.json").write_text(json.dumps(config))
    settings = ScoreConfig(model=str(hf), input=rows, output=output, prompts=Rendering(template="chat")).decisive()
    output.write_text(json.dumps({**GOOD, "logprobs": [-1.0], "logprob_sum": -1.0}) + "\n")
    output.with_name("out.jsonl.settings.json").write_text(json.dumps({**settings, "date": "2001-02-03"}))
    assert begins("hf") == "3"
    with pytest.raises(ConfigError, match=r"other settings \(date '2001-02-03' -> '2001-02-04'\); put them back"):
        begins("hf", date="2001-02-04")


def test_a_digest_sees_every_file_and_every_part_of_a_large_one(tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "model.safetensors"
    weights.parent.mkdir()
    size = 3 * BLOCK * BLOCKS
    weights.write_bytes(bytes(size))
    (tmp_path / "model.json").write_text("{}")
    before = content(tmp_path)
    (tmp_path / "notes.txt").write_text("decides nothing")
    assert content(tmp_path) == before
    # A layer of a 1/64th of the file that was trained on changes bytes all over that part.
    for part in range(BLOCKS):
        with weights.open("r+b") as file:
            file.seek(part * size // BLOCKS)
            file.write(b"1" * (size // BLOCKS))
        assert content(tmp_path) != before
        before = content(tmp_path)
    (tmp_path / "model.json").write_text('{"score_offset": 1}')
    assert content(tmp_path) != before
