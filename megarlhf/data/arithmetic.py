"""The built-in task: word problems of a few arithmetic steps, worked out aloud, with an exact verifier.

    Tom has 5 apples. Tom buys 3. Tom loses 2. How many apples does Tom have?
    5 + 3 = 8. 8 - 2 = 6. The answer is 6.

Demonstrations are of mixed quality, as people's are: a model trained on them knows the arithmetic and often does not
use it, and that is what RLHF can mend. A problem belongs to the train or the held-out split by a hash of its numbers
and operations, so no chain of sums met in training, under whatever names, is ever evaluated on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import pydantic

from megarlhf.config import Config
from megarlhf.errors import ConfigError

Split = Literal["train", "heldout"]
Mistake = Literal["none", "drop_last_step", "wrong_operation", "guess"]

LARGEST_NUMBER = 99
"""The vocabulary has one token for each of 0..99; every level stays inside."""
HELDOUT_EVERY = 8
"""One number chain in 8 is held out; every level has more than 1000 held-out problems (level 1 in 445 chains or so)."""
STEP_SEPARATOR = ". "
"""What parts the steps of a response: one operation each, and the sentence that has the answer."""
_BARREN_DRAWS = 20_000
"""Draws without a new problem after which a level counts as exhausted."""

_NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lily")
_ITEMS = ("apples", "books", "coins", "shells", "stamps", "cards")
_VERBS = {"+": ("buys", "finds", "gets"), "-": ("loses", "sells", "drops")}
_ANSWER = re.compile(r"The answer is (0|[1-9][0-9]*)\.\s*\Z")


class Level(NamedTuple):
    """A difficulty: how many steps, how large a running total, and which operations."""

    steps: tuple[int, int]
    largest: int
    operations: str


LEVELS = {
    1: Level((2, 2), 20, "+-"),
    2: Level((2, 3), 20, "+-"),
    3: Level((3, 4), 40, "+-*"),
    4: Level((4, 6), LARGEST_NUMBER, "+-*"),
}


class Mixture(Config):
    """Shares of each kind of demonstration; they sum to 1."""

    right: float = pydantic.Field(default=0.35, ge=0, le=1)
    """Share that is right with full working. Source: tuned, see `drop_last_step`."""
    drop_last_step: float = pydantic.Field(default=0.35, ge=0, le=1)
    """Share that stops one step early and answers with the running total. Source: tuned; as often as a right one, so
    that greedy decoding fails too now and then, and sampled answers are right in 4 of 10."""
    wrong_operation: float = pydantic.Field(default=0.15, ge=0, le=1)
    """Share that adds where it should subtract, or the like, in one step and goes on from there."""
    guess: float = pydantic.Field(default=0.15, ge=0, le=1)
    """Share that answers at once with a number drawn at random, now and then the right one."""

    @pydantic.model_validator(mode="after")
    def _sums_to_one(self) -> Mixture:
        total = self.right + self.drop_last_step + self.wrong_operation + self.guess
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares right, drop_last_step, wrong_operation and guess sum to {total:g}, not 1")
        return self


class ArithmeticConfig(Config):
    """What to generate. The same settings give the same rows on every machine, and fewer rows are a prefix of more."""

    level: int = pydantic.Field(default=2, ge=1, le=len(LEVELS))
    """Difficulty, 1 (two steps up to 20) to 4 (four to six steps up to 99, with multiplication)."""
    rows: int = pydantic.Field(default=4000, ge=1, le=1_000_000)
    """Distinct problems to generate."""
    seed: int = pydantic.Field(default=1, ge=0)
    """Seed of the problems and of their demonstrations; give each stage of a pipeline its own."""
    responses: int = pydantic.Field(default=4, ge=2)
    """Demonstrations sampled per problem when making preference pairs."""
    mixture: Mixture = Mixture()
    """Quality of the demonstrations."""


@dataclass(frozen=True)
class Problem:
    """A word problem: `start` of `item`, then `steps` of (operation, operand, verb)."""

    name: str
    item: str
    start: int
    steps: tuple[tuple[str, int, str], ...]

    @property
    def text(self) -> str:
        """The prompt."""
        said = [f"{self.name} has {self.start} {self.item}."]
        for operation, operand, verb in self.steps:
            times = operation == "*"
            said.append(f"Now {self.name} has {operand} times as many." if times else f"{self.name} {verb} {operand}.")
        return " ".join([*said, f"How many {self.item} does {self.name} have?"])

    @property
    def chain(self) -> tuple[tuple[str, int], ...]:
        """Operations and operands alone."""
        return tuple((operation, operand) for operation, operand, _ in self.steps)

    @property
    def answer(self) -> int:
        """The right answer."""
        return _totals(self.start, self.chain)[-1]

    @property
    def split(self) -> Split:
        """Where the problem belongs, by its numbers and operations alone: names cannot leak it to the other side."""
        content = str(self.start) + "".join(f"{operation}{operand}" for operation, operand in self.chain)
        bucket = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % HELDOUT_EVERY
        return "heldout" if bucket == 0 else "train"

    def solution(self) -> str:
        """Full working and the right answer."""
        return _worked(self.start, self.chain)


def is_correct(response: str, answer: str) -> bool:
    """Whether `response` ends in "The answer is N." with N exactly `answer`, digit for digit."""
    found = _ANSWER.search(response)
    return found is not None and found[1] == answer


def problems(config: ArithmeticConfig, split: Split) -> list[Problem]:
    """`config.rows` problems of the split, no text twice.

    Raises:   ConfigError if the level has fewer problems than asked for.
    """
    rng = Random(f"problems {config.seed} {config.level} {split}")
    found: dict[str, Problem] = {}
    barren = 0
    while len(found) < config.rows:
        problem = _draw(LEVELS[config.level], rng)
        barren += 1
        if problem.split == split and problem.text not in found:
            found[problem.text] = problem
            barren = 0
        if barren == _BARREN_DRAWS:
            raise ConfigError(
                f"arithmetic.rows: level {config.level} has about {len(found)} distinct {split} problems, "
                f"{config.rows} were asked for; ask for fewer or choose a higher level."
            )
    return list(found.values())


def demonstration(problem: Problem, mistake: Mistake, rng: Random) -> str:
    """A response with the given mistake.

    Where no operation of the problem can be mistaken without leaving 0..99 or landing on the right answer, a
    `wrong_operation` becomes a dropped last step.
    """
    if mistake == "guess":
        return _worked(rng.randint(0, max(_totals(problem.start, problem.chain))), ())
    if mistake == "wrong_operation":
        candidates = list(_mistaken(problem))
        if candidates:
            return _worked(problem.start, rng.choice(candidates))
    return problem.solution() if mistake == "none" else _worked(problem.start, problem.chain[:-1])


def prompt_rows(config: ArithmeticConfig, split: Split) -> list[dict]:
    """Rows {prompt, answer} for rollouts and evaluation."""
    return [{"prompt": problem.text, "answer": str(problem.answer)} for problem in problems(config, split)]


def sft_rows(config: ArithmeticConfig, split: Split) -> list[dict]:
    """Rows {prompt, response}: one demonstration of each problem, of mixed quality."""
    return [{"prompt": problem.text, "response": said[0]} for problem, said in _demonstrated(config, split, 1)]


def labelled_rows(config: ArithmeticConfig, split: Split) -> list[dict]:
    """Rows {prompt, response, correct}: one demonstration of each problem and the verifier's judgement."""
    return [
        {"prompt": problem.text, "response": said[0], "correct": float(is_correct(said[0], str(problem.answer)))}
        for problem, said in _demonstrated(config, split, 1)
    ]


def solution_rows(config: ArithmeticConfig, split: Split) -> list[dict]:
    """Rows {prompt, response, answer}: one demonstration of each problem, of mixed quality, and the right answer."""
    return [
        {"prompt": problem.text, "response": said[0], "answer": str(problem.answer)}
        for problem, said in _demonstrated(config, split, 1)
    ]


def step_rows(config: ArithmeticConfig, split: Split) -> list[dict]:
    """Rows {prompt, steps, labels}: one demonstration of each problem, 1 for a step after which it is right so far."""
    return [judged_steps(problem, said[0]) for problem, said in _demonstrated(config, split, 1)]


def judged_steps(problem: Problem, response: str) -> dict:
    """The row {prompt, steps, labels} of a response to `problem`, 1 for a step after which it is right so far."""
    steps, right = response.split(STEP_SEPARATOR), problem.solution().split(STEP_SEPARATOR)
    labels = [float(steps[: count + 1] == right[: count + 1]) for count in range(len(steps))]
    return {"prompt": problem.text, "steps": steps, "labels": labels}


def preference_rows(config: ArithmeticConfig, split: Split) -> list[dict]:
    """Rows {prompt, chosen, rejected}: right against wrong among `config.responses` demonstrations of each problem.

    A problem whose demonstrations are all right or all wrong gives no row.
    """
    return make_pairs(
        {
            problem.text: [(response, is_correct(response, str(problem.answer))) for response in said]
            for problem, said in _demonstrated(config, split, config.responses)
        }
    )


def make_pairs(responses_per_prompt: dict[str, Sequence[tuple[str, bool]]]) -> list[dict]:
    """Preference rows {prompt, chosen, rejected} from judged responses {prompt: [(response, correct), ...]}.

    The k-th distinct correct response of a prompt meets its k-th distinct wrong one, so no response is used twice and
    a prompt gives min(correct, wrong) pairs.
    """
    rows = []
    for prompt, judged in responses_per_prompt.items():
        distinct = dict(judged)
        chosen = [response for response, correct in distinct.items() if correct]
        rejected = [response for response, correct in distinct.items() if not correct]
        rows += [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in zip(chosen, rejected, strict=False)]
    return rows


def words() -> list[str]:
    """Every word, number and mark of every level's prompts and responses: the tiny tokenizer's vocabulary."""
    text = ("has", "Now", "times", "as", "many", "How", "does", "have", "The", "answer", "is", *".?+-*=")
    return [*text, *_NAMES, *_ITEMS, *_VERBS["+"], *_VERBS["-"], *map(str, range(LARGEST_NUMBER + 1))]


def _draw(level: Level, rng: Random) -> Problem:
    start = total = rng.randint(2, level.largest)
    steps = []
    for _ in range(rng.randint(*level.steps)):
        operation, operand = rng.choice(_moves(total, level, rng.choice(level.operations)))
        verb = rng.choice(_VERBS[operation]) if operation in _VERBS else ""
        steps.append((operation, operand, verb))
        total = _apply(total, operation, operand)
    return Problem(rng.choice(_NAMES), rng.choice(_ITEMS), start, tuple(steps))


def _moves(total: int, level: Level, wanted: str) -> list[tuple[str, int]]:
    """Steps from `total` that stay in 0..largest: of the wanted operation if there are any."""
    operands = {"+": range(1, 10), "-": range(1, 10), "*": range(2, 4)}
    every = [(operation, operand) for operation in level.operations for operand in operands[operation]]
    legal = [step for step in every if 0 <= _apply(total, *step) <= level.largest and (step[0] != "*" or total)]
    return [step for step in legal if step[0] == wanted] or legal


def _mistaken(problem: Problem) -> Iterator[tuple[tuple[str, int], ...]]:
    """Chains with one operation exchanged that stay in 0..99 and miss the answer."""
    for index, (operation, operand) in enumerate(problem.chain):
        for other in "+-":
            chain = (*problem.chain[:index], (other, operand), *problem.chain[index + 1 :])
            totals = _totals(problem.start, chain)
            inside = min(totals) >= 0 and max(totals) <= LARGEST_NUMBER
            if other != operation and inside and totals[-1] != problem.answer:
                yield chain


def _demonstrated(config: ArithmeticConfig, split: Split, count: int) -> Iterator[tuple[Problem, list[str]]]:
    rng = Random(f"demonstrations {config.seed} {config.level} {split} {count}")
    kinds: list[Mistake] = ["none", "drop_last_step", "wrong_operation", "guess"]
    mixture = config.mixture
    shares = [mixture.right, mixture.drop_last_step, mixture.wrong_operation, mixture.guess]
    for problem in problems(config, split):
        yield problem, [demonstration(problem, kind, rng) for kind in rng.choices(kinds, shares, k=count)]


def _apply(total: int, operation: str, operand: int) -> int:
    if operation == "+":
        return total + operand
    return total - operand if operation == "-" else total * operand


def _totals(start: int, chain: Sequence[tuple[str, int]]) -> list[int]:
    """The running total before, between and after the steps."""
    totals = [start]
    for operation, operand in chain:
        totals.append(_apply(totals[-1], operation, operand))
    return totals


def _worked(start: int, chain: Sequence[tuple[str, int]]) -> str:
    totals = _totals(start, chain)
    lines = [
        f"{before} {operation} {operand} = {after}."
        for before, (operation, operand), after in zip(totals, chain, totals[1:], strict=False)
    ]
    return " ".join([*lines, f"The answer is {totals[-1]}."])
