"""The files of a sample pool as they are written: response by response, in order, so that a kill leaves what is there.

eval/pool.py has what they are.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megarlhf.batch.rollouts import Rollout
from megarlhf.commands.row_file import changes, finite
from megarlhf.data.prompts import PromptSet
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.eval.pool import (
    ABOUT,
    PROMPTS,
    RESPONSES,
    SCORES,
    SHARD,
    TOKENIZER,
    Order,
    prompt_lines,
    read_about,
    shard,
    shards,
    written,
)
from megarlhf.observe.files import opened, write_whole, writing
from megarlhf.observe.provenance import versions
from megarlhf.observe.run_files import LOCK
from megarlhf.runtime.outputs import check_directory, check_room


@dataclass(frozen=True)
class PoolFiles:
    """A pool that is being drawn, and what must be true of it to go on with it."""

    directory: Path
    settings: Mapping[str, Any]
    """Every setting that decides what is drawn, by name; JSON values."""
    source: str
    """Where the prompts come from."""
    prompts: PromptSet
    tokenizer: Tokenizer
    order: Order

    @property
    def lock(self) -> Path:
        """Held by who writes it."""
        return self.directory / LOCK

    def check(self) -> None:
        """Raise ConfigError where the pool cannot be written, or was begun by something else or otherwise."""
        check_directory(self.directory, "pool")
        if not is_begun(self.directory):
            _check_empty(self.directory)
            place = next(path for path in (self.directory, *self.directory.absolute().parents) if path.is_dir())
            needed = len(prompt_lines(self.prompts).encode())
            check_room(place, needed, f"pool={self.directory}", "choose another pool")
            return
        about = read_about(self.directory)
        if found := changes(about.get("settings", {}), self.settings):
            raise ConfigError(
                f"pool={self.directory} was begun with other settings ({found}); put them back to go on with it, or "
                "choose another pool."
            )
        if (self.directory / PROMPTS).read_text(encoding="utf-8") != prompt_lines(self.prompts):
            raise ConfigError(
                f"pool={self.directory} was begun with other prompts; put them back to go on with it, or choose "
                "another pool."
            )

    def done(self) -> int:
        """How many responses are there. Raises as `check`, and where the pool has grown since the command began."""
        self.check()
        if rounds_of(self.directory, self.order.rounds[-1]) != self.order.rounds:
            raise ConfigError(f"pool={self.directory} was written by another process meanwhile; start again.")
        return written(self.directory)

    def begin(self) -> None:
        """Make ready for the responses that are not there: a line that was cut is removed. Rank 0 only."""
        with writing(self.directory):
            (self.directory / RESPONSES).mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(self.directory / TOKENIZER)
        write_whole(self.directory / PROMPTS, prompt_lines(self.prompts))
        begun = is_begun(self.directory)
        known = read_about(self.directory) if begun else {"source": self.source, "versions": versions()}
        about = {
            "settings": self.settings,
            "rounds": self.order.rounds,
            "source": known["source"],
            "prompts": len(self.prompts),
            "eos_ids": self.tokenizer.eos_ids,
            "pad_id": self.tokenizer.pad_id,
            "date": None if self.tokenizer.date is None else str(self.tokenizer.date),
            "versions": known["versions"],
        }
        # Last: with it, all else is there.
        write_whole(self.directory / ABOUT, json.dumps(about, indent=2) + "\n")
        for file in shards(self.directory)[-1:]:
            whole = file.read_bytes().rpartition(b"\n")
            with opened(file, "ab") as last, writing(file):
                last.truncate(len(whole[0]) + len(whole[1]))

    def write(self, first: int, lines: Sequence[bytes]) -> None:
        """Add the response `first` of all and those behind it. Rank 0 only."""
        numbered = enumerate(lines, start=first)
        for _, of_file in groupby(numbered, key=lambda each: each[0] // SHARD):
            rows = list(of_file)
            file = shard(self.directory, rows[0][0])
            with opened(file, "ab") as end, writing(file):
                end.writelines(line for _, line in rows)

    def lines(self, first: int, rollout: Rollout, fields: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """The lines of some responses, of which `first` is the first one's place among all. fields: of each."""
        starts, ends = rollout.prompt_lengths.tolist(), rollout.lengths.tolist()
        tokens, logprobs = rollout.tokens.tolist(), rollout.sampler_logprobs.tolist()
        lines = []
        for at, field in enumerate(fields):
            place, start, end = self.order.at(first + at), starts[at], ends[at]
            known = {"row": self.prompts.ids[place.prompt], "sample": place.sample, "seed": self.settings["seed"]}
            drawn = {"logprobs": [*map(finite, logprobs[at][start - 1 : end - 1])], "ids": tokens[at][start:end]}
            text = json.dumps({**known, **field, **drawn}, ensure_ascii=False)
            lines.append(text.encode("utf-8", "backslashreplace") + b"\n")
        return lines


def is_begun(directory: Path) -> bool:
    """Whether there is a pool in a directory, whole or not."""
    return (directory / ABOUT).is_file()


def rounds_of(directory: Path, n: int) -> tuple[int, ...]:
    """The rounds of the pool in a directory, new or there already, that is to have n responses a prompt.

    Raises:   ConfigError where it has more.
    """
    rounds = tuple(read_about(directory)["rounds"]) if is_begun(directory) else ()
    if rounds and n < rounds[-1]:
        raise ConfigError(
            f"n={n}: pool={directory} is one of {rounds[-1]} responses a prompt; set n={rounds[-1]} to go on with it, "
            "or more to let it grow."
        )
    return rounds if rounds and n == rounds[-1] else (*rounds, n)


def day_of(directory: Path) -> datetime.date | None:
    """The day that the chat template was told when the pool was begun; None where it was not."""
    day = read_about(directory)["date"] if is_begun(directory) else None
    return None if day is None else datetime.date.fromisoformat(day)


def _check_empty(directory: Path) -> None:
    ours = {PROMPTS, TOKENIZER, RESPONSES, SCORES, LOCK, f"{PROMPTS}.partial", f"{ABOUT}.partial"}
    others = sorted(path.name for path in directory.iterdir() if path.name not in ours) if directory.is_dir() else []
    if others:
        raise ConfigError(
            f"pool={directory} has {others[0]} and no {ABOUT}: this command has not begun it; choose another directory."
        )
