"""Solutions whose steps are to be labelled. Columns: prompt, and steps (a list of text) or response; and answer.

A response is parted into steps by the separator; a piece of white space alone is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megarlhf.data.arithmetic import solution_rows
from megarlhf.data.columns import Columns
from megarlhf.data.prompts import PromptSet, answer_of
from megarlhf.data.row import Row
from megarlhf.data.rows import HERE, DataConfig, Origin, read_rows, within_limit
from megarlhf.data.shapes import Shape
from megarlhf.data.steps import check_own_ends, parted, stepped
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import DataError

SHAPES = (
    Shape("prompt, steps", ("prompt", "steps"), own=True),
    Shape("prompt, response", ("prompt", "response"), when=lambda row: row.get("steps") is None, own=True),
)
COLUMNS = Columns("solutions", ("prompt", "steps", "response", "answer"), SHAPES)


class Solution(NamedTuple):
    """A prompt and the steps that follow it."""

    prompt: Sequence[int]
    """Ids."""
    response: Sequence[int]
    """Ids of all steps, EOS in."""
    ends: Sequence[int]
    """The last token of each step in the response."""
    steps: Sequence[str]
    answer: str
    """The expected one, "" where unknown."""

    def beginnings(self) -> list[tuple[int, ...]]:
        """Ids of the prompt with the first step, with the first two, and so on; but for the last, which ends it."""
        return [(*self.prompt, *self.response[: end + 1]) for end in self.ends[:-1]]


@dataclass(frozen=True)
class SolutionSet:
    """Tokenised solutions."""

    solutions: Sequence[Solution]
    rows: Sequence[Row]
    """Each with its columns as the data have them, and steps."""
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""
    origin: Origin = HERE

    def __len__(self) -> int:
        return len(self.solutions)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(len(each.prompt) + len(each.response) for each in self.solutions)

    @property
    def count(self) -> int:
        """Tokens of all."""
        return sum(len(each.prompt) + len(each.response) for each in self.solutions)

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        first, begin = self.solutions[0], 0
        parts: dict[str, Sequence[int]] = {"prompt": first.prompt}
        for number, end in enumerate(first.ends, start=1):
            parts[f"step {number}"] = first.response[begin : end + 1]
            begin = end + 1
        return parts

    @property
    def prompts(self) -> PromptSet:
        """The prompts alone, with their rows, by whose places verifiers find them."""
        return PromptSet(
            [each.prompt for each in self.solutions],
            [each.answer for each in self.solutions],
            [row.place for row in self.rows],
            self.pad_id,
            dropped=0,
            columns=[row.columns for row in self.rows],
        )


def load_solutions(config: DataConfig, separator: str, tokenizer: Tokenizer) -> SolutionSet:
    """Read, check and tokenise solutions.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), rows over the limit, or a
              separator that parts no response.
    """
    tokenizer = tokenizer.taking(config.control_tokens)

    def read(row: Row) -> Solution:
        prompt, steps = row.prompt_ids(tokenizer, config.rendering), steps_of(row, separator)
        response, ends = stepped(row, steps, separator, tokenizer)
        check_own_ends(row, response, ends, range(len(ends)), tokenizer)
        return Solution(prompt, response, ends, steps, answer_of(row))

    loaded = read_rows(config, solution_rows, COLUMNS, read)
    kept = within_limit(config, loaded, [len(each.prompt) + len(each.response) for each in loaded.values])
    solutions = [loaded.values[index] for index in kept.indices]
    given = any(loaded.rows[index].columns.get("steps") is not None for index in kept.indices)
    if not given and max(len(each.steps) for each in solutions) == 1:
        raise DataError(
            f"separator={separator!r} is in none of the {len(solutions):,} responses of {config.named}, so that each "
            f"would be one step; say what parts their steps: on a command line separator='\". \"' for sentences."
        )
    rows = [
        replace(loaded.rows[index], columns={**loaded.rows[index].columns, "steps": list(loaded.values[index].steps)})
        for index in kept.indices
    ]
    return SolutionSet(solutions, rows, tokenizer.pad_id, kept.dropped, kept.origin)


def steps_of(row: Row, separator: str) -> list[str]:
    """The column steps, or response in pieces. Raises DataError where a step is no text, or blank, or there is none."""
    if row.columns.get("steps") is not None:
        return row.texts("steps")
    pieces = parted(row.text("response"), separator)
    if not pieces:
        raise row.fault("response", f"nothing but {separator!r}, which parts steps; write a step or remove the row")
    return pieces
