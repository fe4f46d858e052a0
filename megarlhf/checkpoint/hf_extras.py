"""What a Hugging Face directory knows beside weights and tokenizer, and a model directory keeps: see `EXTRAS`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarlhf.errors import CheckpointError
from megarlhf.observe.files import read_object

EXTRAS = "huggingface"
"""Folder of a model directory with CONFIG and GENERATION as they came."""
CONFIG = "config.json"
GENERATION = "generation_config.json"
EOS = "eos_token_id"
"""Their entry of what ends a response: an id, or a list of them."""


def end_ids(directory: Path) -> tuple[int, ...]:
    """Every id that ends a response by the files of `directory`, those of CONFIG first.

    Raises:   CheckpointError where a file is no JSON object, or names something that is no id.
    """
    found = [_ids(json_object(directory / name), directory / name) for name in (CONFIG, GENERATION)]
    return tuple(dict.fromkeys(number for ids in found for number in ids))


def kept(origin: Path, end: int) -> dict[str, str]:
    """The text of CONFIG and GENERATION for a model trained from `origin`, a directory of either kind; by file name.

    They stay as they are, unless they lack `end`, which the model was taught: nobody could know that it stops there.
    """
    source = origin / EXTRAS if (origin / EXTRAS).is_dir() else origin
    texts = {}
    for name in (CONFIG, GENERATION):
        found = json_object(source / name)
        if not found:
            continue
        texts[name] = (source / name).read_text(encoding="utf-8")
        ids = _ids(found, source / name)
        # Without an entry of its own, GENERATION goes by CONFIG's.
        if end not in ids and (name == CONFIG or ids):
            found[EOS] = bare([*ids, end])
            texts[name] = json.dumps(found, indent=2) + "\n"
    return texts


def bare(ids: Sequence[int]) -> int | list[int]:
    """Ids as those files have them: one alone without a list."""
    return ids[0] if len(ids) == 1 else list(ids)


def json_object(path: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none. Raises CheckpointError where it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download the model again.") from None


def _ids(found: dict[str, Any], path: Path) -> list[int]:
    given = found.get(EOS)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for number in ids:
        if type(number) is not int or number < 0:  # true is an int to isinstance
            raise CheckpointError(f"{path}: {EOS}={given!r} is neither a token id nor a list of them; correct it.")
    return ids
