"""A sample pool: many responses to each of some prompts, drawn once, and what judges say of them.

DIR/pool.json               what drew it, and how many responses a prompt
DIR/prompts.jsonl           every prompt: its row in the data, its tokens, its answer, all columns of its row
DIR/tokenizer/              Hugging Face tokenizer
DIR/responses/shard-N.jsonl the responses, SHARD a file
DIR/scores/JUDGE.jsonl      what a judge says of every distinct response

Responses come in rounds: at first so many to each prompt, prompt by prompt; where the pool grows, the further ones to
each prompt come behind all that are there.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.prompts import PromptSet
from megarlhf.data.rows import pad_right
from megarlhf.data.tokenizer import Tokenizer, load_tokenizer
from megarlhf.errors import ConfigError, DataError
from megarlhf.observe.files import json_lines, read_object

ABOUT, PROMPTS, TOKENIZER, RESPONSES, SCORES = "pool.json", "prompts.jsonl", "tokenizer", "responses", "scores"
SHARD = 4096
"""Responses of one file."""
WINDOW = 4096
"""Responses among which a judge is given those of like length together."""


class Place(NamedTuple):
    """Which response it is."""

    prompt: int
    """Index among the prompts of the pool."""
    sample: int
    """Index among the responses to it, from 0."""


@dataclass(frozen=True)
class Order:
    """In which order the responses of a pool lie."""

    prompts: int
    rounds: tuple[int, ...]
    """Responses a prompt at the end of each round, ascending."""

    @property
    def total(self) -> int:
        """Responses of all rounds."""
        return self.prompts * self.rounds[-1]

    @cached_property
    def parts(self) -> list[tuple[int, int, int]]:
        """Of each round: its first response among all, its first sample, and how many samples a prompt."""
        starts = (0, *self.rounds)
        return [(self.prompts * start, start, stop - start) for start, stop in itertools.pairwise(starts)]

    def __iter__(self) -> Iterator[Place]:
        """Every response in order."""
        for _, start, count in self.parts:
            for prompt in range(self.prompts):
                for sample in range(start, start + count):
                    yield Place(prompt, sample)

    def at(self, index: int) -> Place:
        """The response that lies there, 0 <= index < total."""
        first, sample, count = next(part for part in reversed(self.parts) if part[0] <= index)
        prompt, further = divmod(index - first, count)
        return Place(prompt, sample + further)

    def windows(self) -> list[range]:
        """The responses in order, in runs of up to WINDOW that no growth of the pool changes."""
        ends = [(first, first + self.prompts * count) for first, _, count in self.parts]
        return [range(start, min(start + WINDOW, end)) for first, end in ends for start in range(first, end, WINDOW)]


@dataclass(frozen=True)
class Sampled:
    """One response of a pool."""

    place: Place
    response: str
    logprob: float
    """Of all of it, in nats, at the temperature it was drawn at."""
    ids: NDArray[np.int32]
    """Its tokens, EOS among them."""
    terminated: bool
    """It ended by itself."""

    @property
    def key(self) -> bytes:
        """Equal for equal responses to one prompt."""
        return hashlib.blake2b(self.ids.tobytes(), digest_size=16).digest() + self.place.prompt.to_bytes(8)


@dataclass(frozen=True)
class Pool:
    """A pool that is whole."""

    directory: Path
    about: Mapping[str, Any]
    """What `pool.json` says."""
    prompts: PromptSet
    order: Order

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That the responses were drawn with; it ends responses where the model did."""
        day = self.about["date"]
        date = None if day is None else datetime.date.fromisoformat(day)
        return load_tokenizer(self.directory / TOKENIZER).of_model(self.about["eos_ids"], date)

    def responses(self) -> Iterator[Sampled]:
        """All of them, in order. Raises DataError where the files are not those that were written."""
        found = itertools.chain.from_iterable(map(json_lines, shards(self.directory)))
        for index, place in enumerate(self.order):
            line = next(found, None)
            try:
                assert line is not None
                if (line["row"], line["sample"]) != (self.prompts.ids[place.prompt], place.sample):
                    raise ValueError
                ids = np.array(line["ids"], dtype=np.int32)
                logprob = np.nan if line["logprob"] is None else float(line["logprob"])
                yield Sampled(place, str(line["response"]), logprob, ids, bool(line["terminated"]))
            except (AssertionError, KeyError, TypeError, ValueError):
                raise DataError(
                    f"{shard(self.directory, index)}, row {index % SHARD + 1}: not sample {place.sample} of the prompt "
                    f"in row {self.prompts.ids[place.prompt] + 1}; draw the pool again, into another directory."
                ) from None

    @property
    def distinct(self) -> list[Sampled]:
        """Every response once, by its first sample, in the order in which judges see them: that of the pool, in runs of
        up to WINDOW of it, in which short ones come first."""
        return self._told_apart[0]

    @property
    def places(self) -> NDArray[np.int64]:
        """[prompts, samples]: which of the distinct responses each response is."""
        return self._told_apart[1]

    @cached_property
    def _told_apart(self) -> tuple[list[Sampled], NDArray[np.int64]]:
        known: dict[bytes, int] = {}
        found: list[Sampled] = []
        places = np.empty((len(self.prompts), self.order.rounds[-1]), dtype=np.int64)
        every = self.responses()
        for window in self.order.windows():
            keys: dict[Place, bytes] = {}
            fresh: dict[bytes, Sampled] = {}
            for response in itertools.islice(every, len(window)):
                keys[response.place] = key = response.key
                if key not in known:
                    fresh.setdefault(key, response)
            for key, response in sorted(fresh.items(), key=lambda each: self._length(each[1])):
                known[key] = len(found)
                found.append(response)
            for place, key in keys.items():
                places[place] = known[key]
        return found, places

    def rollout(self, responses: Sequence[Sampled]) -> Rollout:
        """Some responses behind their prompts, as judges take them; no log-probs, which none asks for."""
        prompts = [self.prompts.tokens[each.place.prompt] for each in responses]
        rows = [[*prompt, *each.ids.tolist()] for prompt, each in zip(prompts, responses, strict=True)]
        tokens, lengths = pad_right(rows, self.prompts.pad_id)
        return Rollout(
            tokens=tokens,
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            lengths=lengths,
            terminated=torch.tensor([each.terminated for each in responses]),
            sampler_logprobs=torch.zeros(len(rows), tokens.shape[1] - 1),
            prompt_ids=torch.tensor([self.prompts.ids[each.place.prompt] for each in responses]),
            answers=tuple(self.prompts.answers[each.place.prompt] for each in responses),
        )

    def _length(self, of: Sampled) -> tuple[int, Place]:
        return len(self.prompts.tokens[of.place.prompt]) + len(of.ids), of.place

    @property
    def judges(self) -> list[str]:
        """Those that have judged it, or have begun to, by name."""
        return sorted(path.stem for path in (self.directory / SCORES).glob("*.jsonl"))


def shard(directory: Path, index: int) -> Path:
    """The file of the response `index` of all."""
    return directory / RESPONSES / f"shard-{index // SHARD:05d}.jsonl"


def shards(directory: Path) -> list[Path]:
    """The files of responses that are there, in order."""
    return sorted((directory / RESPONSES).glob("shard-*.jsonl"))


def score_file(directory: Path, judge: str) -> Path:
    """What a judge says of the pool in a directory."""
    return directory / SCORES / f"{judge}.jsonl"


def written(directory: Path) -> int:
    """Whole responses that are there. Those of all files but the last are taken to be SHARD each."""
    files = shards(directory)
    return (len(files) - 1) * SHARD + sum(1 for _ in json_lines(files[-1])) if files else 0


def prompt_lines(prompts: PromptSet) -> str:
    """The file of prompts: JSON lines."""
    rows = zip(prompts.ids, prompts.tokens, prompts.answers, prompts.columns, strict=True)
    lines = (
        json.dumps({"row": row, "tokens": list(tokens), "answer": answer, "columns": columns}, ensure_ascii=False)
        for row, tokens, answer, columns in rows
    )
    text = "".join(f"{line}\n" for line in lines)
    # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes the \udXXX that JSON writes for it.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_about(directory: Path) -> dict[str, Any]:
    """What `pool.json` says. Raises ConfigError where there is none, or it is damaged."""
    file = directory / ABOUT
    if not file.is_file():
        raise ConfigError(
            f"pool={directory}: there is no {ABOUT}; name a directory that megarlhf generate pool=DIR made."
        )
    try:
        about = read_object(file)
        rounds = about["rounds"]
        if not rounds or rounds != sorted(set(rounds)) or not all(type(each) is int and each > 0 for each in rounds):
            raise ValueError(f"rounds {rounds!r} are no rising numbers")
        known = {name: about[name] for name in ("settings", "source", "prompts", "pad_id", "date", "versions")}
        return {**known, "rounds": rounds, "eos_ids": list(about["eos_ids"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({error}); draw the pool again, into another directory.") from None


def open_pool(directory: Path) -> Pool:
    """The pool in a directory. Raises ConfigError where there is none, or it is not whole; DataError where damaged."""
    about = read_about(directory)
    rows = list(json_lines(directory / PROMPTS)) if (directory / PROMPTS).is_file() else []
    try:
        prompts = PromptSet(
            [row["tokens"] for row in rows if row is not None],
            [row["answer"] for row in rows if row is not None],
            [row["row"] for row in rows if row is not None],
            about["pad_id"],
            dropped=0,
            columns=[row["columns"] for row in rows if row is not None],
        )
    except (KeyError, TypeError):
        prompts = None
    if prompts is None or len(prompts) != about["prompts"]:
        raise DataError(f"{directory / PROMPTS}: damaged; draw the pool again, into another directory.")
    order, there = Order(len(prompts), tuple(about["rounds"])), written(directory)
    if there != order.total:
        raise ConfigError(
            f"pool={directory} has {there:,} of {order.total:,} responses; run the megarlhf generate that began it "
            "again, to its end."
        )
    return Pool(directory, about, prompts, order)
