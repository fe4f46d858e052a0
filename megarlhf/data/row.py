"""One row of a source, and the words to complain about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megarlhf.data.columns import UNNAMED, Columns
from megarlhf.data.dialogue import Dialogue, Supervise, encode_dialogue
from megarlhf.data.sources import shown
from megarlhf.data.tokenizer import Message, Template, Tokenizer
from megarlhf.errors import DataError

_CALLS = ("tool_calls", "function_call")
"""Keys of a turn that calls tools. Templates differ in whether, and how, they write them."""
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row with the words to complain about it: file and 1-based number."""

    source: str
    number: int
    columns: dict[str, Any]
    kind: Columns = UNNAMED
    part: str = ""
    """Of a mix, where the row is of one."""
    before: int = 0
    """Rows of the parts before it."""

    @property
    def place(self) -> int:
        """0-based, over all parts."""
        return self.before + self.number - 1

    def fault(self, column: str, problem: str) -> DataError:
        """A DataError that names file, row and column."""
        return DataError(f"bad row: {self.source}, row {self.number}, column {self.kind.said(column)}: {problem}.")

    def _missing(self, column: str, needed: str) -> DataError:
        hint = self.kind.hint(column, self.columns)
        remedy = f"; {hint}" if hint else f", it needs {needed} there"
        return self.fault(column, f"missing; the row has {sorted(self.columns)}{remedy}")

    def check_free(self, names: Sequence[str]) -> None:
        """Raise DataError where the row has a column by one of these names, which an output adds."""
        for name in names:
            if name in self.columns:
                raise self.fault(name, "the output adds a field of this name; rename or remove this one")

    def text(self, column: str) -> str:
        """The column as text that is not blank.

        Raises:   DataError naming file, row and column; so do the methods below.
        """
        value = self.columns.get(column)
        if value is None:
            raise self._missing(column, "text")
        if not isinstance(value, str):
            raise self.fault(column, f"{shown(value)} is not text; put it in quotes")
        if not value.strip():
            raise self.fault(column, "empty; write some text or remove the row")
        return self._whole(column, value)

    def number_in(self, column: str, low: float, high: float, remedy: str = "") -> float:
        """The column as a number in low..high; true and false are 1 and 0. remedy: what helps besides."""
        value = self.columns.get(column)
        if value is None:
            raise self._missing(column, "a number")
        if not isinstance(value, (int, float)):
            raise self.fault(column, f"{shown(value)} is not a number; write one without quotes")
        if not low <= value <= high:
            raise self.fault(column, f"{shown(value)} is out of range; use {low:g} to {high:g}{remedy}")
        return float(value)

    def texts(self, column: str) -> list[str]:
        """The column as a list of at least one text, none of them blank."""
        for number, value in enumerate(self._listed(column), start=1):
            if not isinstance(value, str):
                raise self.fault(column, f"number {number}, {shown(value)}, is not text; put it in quotes")
            if not value.strip():
                raise self.fault(column, f"number {number} is empty; write some text or remove the row")
            self._whole(column, value)
        return self.columns[column]

    def numbers_in(self, column: str, low: float, high: float) -> list[float | None]:
        """The column as a list of numbers in low..high; true and false are 1 and 0, and null stays."""
        values = self._listed(column)
        for number, value in enumerate(values, start=1):
            if value is not None and not isinstance(value, (int, float)):
                raise self.fault(column, f"number {number}, {shown(value)}, is not a number; write one without quotes")
            if value is not None and not low <= value <= high:
                raise self.fault(column, f"number {number}, {shown(value)}, is out of range; use {low:g} to {high:g}")
        return [None if value is None else float(value) for value in values]

    def _listed(self, column: str) -> list[Any]:
        value = self.columns.get(column)
        if value is None:
            raise self._missing(column, "a list")
        if not isinstance(value, list) or not value:
            raise self.fault(column, f"{shown(value)} is not a list of at least one; write one in brackets")
        return value

    def prompt_ids(self, tokenizer: Tokenizer, template: Template) -> list[int]:
        """Ids of the column `prompt`, text or a conversation [{role, content}, ...]."""
        prompt = self._prompt()
        return self.encoded("prompt", lambda: tokenizer.encode_prompt(prompt, template))

    def answered_ids(self, column: str, tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[int]]:
        """Ids of the column `prompt`, and of a response to it with the EOS that ends it.

        A response that is text is what a sampler would have written; one that is a turn, [{role, content}], is what
        the chat template makes of the whole conversation.
        """
        if not isinstance(self.columns.get(column), list):
            response = self.text(column)
            ids = self.encoded(column, lambda: tokenizer.encode_response(response))
            return self.prompt_ids(tokenizer, template), ids
        prompt, turns = self._prompt(), self.messages(column)
        before: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if len(turns) != 1:
            raise self.fault(column, f"{len(turns)} turns; a response is one, of the assistant")
        ((start, _),), ids = self.dialogue(column, [*before, *turns], tokenizer, template)
        return ids[:start], ids[start:]

    def dialogue(
        self,
        column: str,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        template: Template,
        supervise: Supervise = "last",
    ) -> Dialogue:
        """Ids of a conversation that ends with the assistant, and where the turns that it is taught are."""
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise self.fault(column, "the conversation must end with the assistant, after at least one other turn")
        if not messages[-1]["content"].strip():
            raise self.fault(column, "the last turn is empty; write some text or remove the row")
        return self.encoded(column, lambda: encode_dialogue(tokenizer, messages, template, supervise))

    def encoded(self, column: str, encode: Callable[[], T]) -> T:
        """`encode()`, with what the tokenizer has against the text said of this row and column."""
        try:
            return encode()
        except DataError as error:
            raise self.fault(column, str(error).rstrip(".")) from error

    def messages(self, column: str) -> list[Message]:
        """The column as a conversation of at least one turn, each with a role and content."""
        turns = self.columns.get(column)
        if not isinstance(turns, list) or not turns:
            raise self.fault(column, f"{shown(turns)} is not a conversation; give [{{role, content}}, ...]")
        for turn in turns:
            if isinstance(turn, dict) and any(turn.get(key) for key in _CALLS):
                raise self.fault(column, f"turn {shown(turn)} calls a tool, and calls are not rendered; remove the row")
            if not isinstance(turn, dict) or any(not isinstance(turn.get(key), str) for key in ("role", "content")):
                raise self.fault(column, f"turn {shown(turn)} needs a role and a content, both text")
            self._whole(column, turn["role"] + turn["content"])
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]

    def _prompt(self) -> str | list[Message]:
        return self.messages("prompt") if isinstance(self.columns.get("prompt"), list) else self.text("prompt")

    def _whole(self, column: str, text: str) -> str:
        """`text`, unless it has half of a surrogate pair, which JSON can spell and no tokenizer takes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} is half a character, at {error.start + 1}; remove it"
            raise self.fault(column, half) from error
        return text
