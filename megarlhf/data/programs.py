"""The built-in programs: a line of Python that does with a number what it is told, and tests that say whether it does.

    Read a number, add 3, multiply by 2 and print it. 4 gives 14.
    n = int(input()); n = n + 3; n = n * 2; print(n)

Demonstrations are of mixed quality, like those of arithmetic.py: a wrong one leaves the last step out, or prints what
the example gives. Each problem has two tests, the example and a number that no prompt shows. Programs of such steps are
straight lines, so that one that passes both tests is right for every number; what prints 14 passes one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Any, Literal

import pydantic

from megarlhf.config import Config
from megarlhf.data.arithmetic import HELDOUT_EVERY, LARGEST_NUMBER, Split
from megarlhf.errors import ConfigError

Quality = Literal["right", "unfinished", "hard_coded"]

UNSEEN = 100
"""The number of the second test; the vocabulary does not have it."""
_TOLD = {"+": "add", "-": "subtract", "*": "multiply by"}
_OPERANDS = {"+": range(1, 10), "-": range(1, 10), "*": range(2, 6)}
_STEPS = (2, 3)
_EXAMPLES = range(1, 10)


class ProgramsConfig(Config):
    """What to generate. The same settings give the same rows on every machine, and fewer rows are a prefix of more."""

    rows: int = pydantic.Field(default=4000, ge=1)
    """Distinct problems to generate."""
    seed: int = pydantic.Field(default=1, ge=0)
    """Seed of the problems and of their demonstrations; give each stage of a pipeline its own."""
    right: float = pydantic.Field(default=0.3, ge=0, le=1)
    """Share of demonstrations that are right; half of the others leave the last step out, half print what the example
    gives. Source: tuned; a little less often right than unfinished, so that greedy decoding fails too now and then."""


@dataclass(frozen=True)
class Task:
    """What to do with a number, as (operation, operand), and the number of the example."""

    steps: tuple[tuple[str, int], ...]
    example: int

    @property
    def prompt(self) -> str:
        """What is asked."""
        told = ", ".join(f"{_TOLD[operation]} {operand}" for operation, operand in self.steps)
        return f"Read a number, {told} and print it. {self.example} gives {self.totals(self.example)[-1]}."

    @property
    def tests(self) -> list[dict[str, str]]:
        """As the judge `code_tests` reads them."""
        return [{"stdin": f"{n}\n", "stdout": f"{self.totals(n)[-1]}\n"} for n in (self.example, UNSEEN)]

    @property
    def split(self) -> Split:
        """Where the problem belongs, by its steps alone: another example cannot leak a program to the other side."""
        content = "".join(f"{operation}{operand}" for operation, operand in self.steps)
        bucket = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % HELDOUT_EVERY
        return "heldout" if bucket == 0 else "train"

    def totals(self, number: int) -> list[int]:
        """`number`, and what it is after each step."""
        found = [number]
        for operation, operand in self.steps:
            found.append({"+": found[-1] + operand, "-": found[-1] - operand, "*": found[-1] * operand}[operation])
        return found

    def program(self, quality: Quality) -> str:
        """A demonstration."""
        if quality == "hard_coded":
            return f"print({self.totals(self.example)[-1]})"
        done = self.steps if quality == "right" else self.steps[:-1]
        steps = "".join(f"n = n {operation} {operand}; " for operation, operand in done)
        return f"n = int(input()); {steps}print(n)"


def program_rows(config: ProgramsConfig, split: Split) -> list[dict[str, Any]]:
    """Rows {prompt, response, tests}: what is asked, a demonstration of mixed quality, and what judges any other.

    Raises:   ConfigError if there are fewer problems than asked for.
    """
    every = list(_tasks(split))
    if config.rows > len(every):
        raise ConfigError(f"programs.rows={config.rows}: there are {len(every)} {split} problems; ask for fewer.")
    rng = Random(f"programs {config.seed} {split}")
    rng.shuffle(every)
    kinds: list[Quality] = ["right", "unfinished", "hard_coded"]
    shares = [config.right, (1 - config.right) / 2, (1 - config.right) / 2]
    qualities = rng.choices(kinds, shares, k=len(every))
    return [
        {"prompt": task.prompt, "response": task.program(quality), "tests": task.tests}
        for task, quality in zip(every[: config.rows], qualities, strict=False)
    ]


def words() -> list[str]:
    """Every word, number and mark of prompts and programs: the tokenizer's vocabulary."""
    text = ("Read", "a", "number", "add", "subtract", "multiply", "by", "and", "print", "it", "gives", "int", "input")
    return [*text, "n", *".,;=()+-*", *map(str, range(LARGEST_NUMBER + 1))]


@cache
def _tasks(split: Split) -> tuple[Task, ...]:
    """Every problem of a split whose example has a word for each of its totals."""
    steps = [(operation, operand) for operation, operands in _OPERANDS.items() for operand in operands]
    chains = (chain for count in _STEPS for chain in product(steps, repeat=count) if Task(chain, 0).split == split)
    tasks = (Task(chain, example) for chain in chains for example in _EXAMPLES)
    return tuple(task for task in tasks if all(0 <= total <= LARGEST_NUMBER for total in task.totals(task.example)))
