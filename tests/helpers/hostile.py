"""Files as an attacker or a failing disk leaves them: checkpoints that would run code, and damage drawn at random."""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megarlhf.checkpoint.checksums import CHECKSUMS, write_checksums


class Hostile:
    """Unpickled, it makes the file `mark` and gives what `true` is a pickle of, so that nobody notices."""

    def __init__(self, mark: Path, true: bytes) -> None:
        self.mark, self.true = mark, true

    def __reduce__(self) -> tuple[Any, ...]:
        code = f"[__import__('pathlib').Path({str(self.mark)!r}).touch(), __import__('pickle').loads({self.true!r})][1]"
        return eval, (code,)


def poison(file: Path, mark: Path) -> None:
    """Make the pickle `file` hostile."""
    file.write_bytes(pickle.dumps(Hostile(mark, file.read_bytes())))


def sum_again(directory: Path) -> None:
    """Make the checksums of `directory`, and of what has its own below, fit what is there."""
    for file in sorted(directory.rglob(CHECKSUMS), key=lambda path: -len(path.parts)):
        file.unlink()
        write_checksums(file.parent)


class HungError(BaseException):
    """No Exception, so that no code under test takes it for its own."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise HungError where the block takes longer."""

    def hung(*_: object) -> None:
        raise HungError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


JUNK: list[Any] = [
    *(None, True, 0, -1, 7, 1.5, 10**30, -(10**30), float("nan"), float("inf"), [], {}, [1], [[]], {"a": 1}),
    *(
        "",
        "x",
        "9" * 5000,
        "\x1b[31m\0",
        "\ud800",
        "../../../etc/passwd",
        "/etc/passwd",
        "..",
        "a/../../b",
        "/dev/zero",
    ),
]
"""What takes the place of a value in JSON: another type, huge, for the terminal, half a character, a way out."""


@dataclass(frozen=True)
class Damage:
    """What was done to one file."""

    file: str
    how: str
    last: int = 0
    """The last byte that is another, where bytes were flipped or zeroed."""


def damage(root: Path, random: Random) -> Damage:
    """Damage one file of `root`, in its bytes or, two times in five of what is JSON, in what it says."""
    path = random.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    file = path.relative_to(root).as_posix()
    if path.suffix == ".json" and random.random() < 0.4:
        return Damage(file, _damage_json(path, random))
    return _damage_bytes(path, file, random)


def _damage_bytes(path: Path, file: str, random: Random) -> Damage:
    data = bytearray(path.read_bytes())
    how = random.choice(["flipped", "flipped", "zeroed", "truncated", "appended", "emptied", "deleted"])
    last = 0
    if how == "deleted":
        path.unlink()
        return Damage(file, how)
    if how == "emptied" or not data:
        data = bytearray()
    elif how == "truncated":
        del data[random.randrange(len(data)) :]
    elif how == "appended":
        data += random.randbytes(random.choice([1, 100]))
    elif how == "zeroed":
        first = random.randrange(len(data))
        last = min(first + 511, len(data) - 1)
        data[first : last + 1] = bytes(last + 1 - first)
    else:
        # Half of the time where the headers are.
        end = random.choice([len(data), min(len(data), 2000)])
        for _ in range(random.choice([1, 4, 30])):
            at = random.randrange(end)
            data[at] ^= 1 << random.randrange(8)
            last = max(last, at)
    path.write_bytes(data)
    return Damage(file, how, last)


def _damage_json(path: Path, random: Random) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    places = [*_places(content)]
    # A vocabulary would draw most of the choices.
    upper = [place for place in places if len(place) <= 2]
    place = random.choice(upper if random.random() < 0.7 else places) if places and random.random() < 0.95 else ()
    junk = random.choice(JUNK)
    if not place:
        content, how = junk, f"is {junk!r}"
    else:
        *above, name = place
        group = content
        for parent in above:
            group = group[parent]
        if random.random() < 0.25:
            del group[name]
            how = f"without {'.'.join(map(str, place))}"
        else:
            group[name] = junk
            how = f"with {'.'.join(map(str, place))}={junk!r}"
    path.write_text(json.dumps(content), encoding="utf-8")
    return how[:120]


def _places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The names that lead to every value of some JSON."""
    named = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in named:
        yield (*above, name)
        yield from _places(value, (*above, name))
