"""Text to token ids and back: any Hugging Face fast tokenizer, and a word-level one for the tiny models.

Files only: nothing is downloaded, and code that a tokenizer directory brings along is never run.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from megarlhf.data.rendered import Rendered, between
from megarlhf.data.same_tokenizer import encoding_of, first_difference
from megarlhf.errors import ConfigError, DataError
from megarlhf.observe.files import link_out

if TYPE_CHECKING:  # imported where used: transformers takes seconds that `--help` should not cost
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"

LLAMA3_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
"""Llama 3's prompt format as its model card gives it, contents trimmed."""

_PAD_FALLBACKS = (PAD, "<|reserved_special_token_0|>")
"""Llama 3.1 and later, and Llama 3: neither sets a padding token of its own."""

Template = Literal["chat", "plain"]
ControlTokens = Literal["refuse", "text", "control"]
_DATE_FIELDS = "aAbBcdDeFgGhHIjklmMnpPrRsSTuUVwWxXyYzZC"
"""Letters of strftime."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


def _chat_template(fast: PreTrainedTokenizerFast, source: str) -> str | None:
    """The text of the chat template; None where there is none, or where none of several is the default."""
    template: Any = fast.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise DataError(
            f"the chat template of {source} is no text but {template!r:.60}; mend chat_template in "
            "tokenizer_config.json, or remove it and set template=plain."
        )
    return template


class Tokenizer:
    """A fast tokenizer with the ids that training needs, checked once: PAD exists and never ends a response."""

    def __init__(self, fast: PreTrainedTokenizerFast, source: str) -> None:
        """Wrap `fast`; `source` names it in errors.

        Raises:   DataError if there is no end-of-response or padding token, or if they are the same.
        """
        vocabulary = fast.get_vocab()
        self._chat_template = _chat_template(fast, source)
        turn_based = self._chat_template is not None and END_OF_TURN in vocabulary
        eos = END_OF_TURN if turn_based else cast("str | None", fast.eos_token)
        pad = fast.pad_token or next((token for token in _PAD_FALLBACKS if token in vocabulary), None)
        if eos is None or pad is None:
            missing = "eos_token" if eos is None else "pad_token"
            raise DataError(f"tokenizer has no {missing}: {source}; set it in tokenizer_config.json.")
        if pad == eos:
            raise DataError(
                f"tokenizer pads with the token that ends a response: {source} has {pad!r} for both, so no model could "
                "learn to stop; set another pad_token in tokenizer_config.json."
            )
        self._fast = fast
        # The Rust tokenizer itself, in half the wrapper's time. Its file may ask it to cut or pad: never here.
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.source = source
        """Where it came from, for errors."""
        self.bos_id: int | None = vocabulary.get(cast(str, fast.bos_token))
        """Id that begins a text; None if the tokenizer has none."""
        self.eos_id: int = vocabulary[eos]
        """Id that ends a response: <|eot_id|> if there is a chat template that knows turns, else the EOS token."""
        self.pad_id: int = vocabulary[cast(str, pad)]
        """Id of padding, never `eos_id`."""
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        """Every id that ends a response where it is drawn, `eos_id` first."""
        self.date: datetime.date | None = None
        """The day that a chat template is told; null for today."""
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Rows that an embedding needs: the largest id + 1."""
        self.control_tokens: ControlTokens = "refuse"
        """What control tokens inside of texts, such as <|eot_id|>, are."""
        special = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        # (?!) matches nothing.
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def taking(self, control_tokens: ControlTokens) -> Tokenizer:
        """This tokenizer where control tokens inside of texts are refused, their letters, or what they control."""
        told = copy.copy(self)
        told.control_tokens = control_tokens
        return told

    def of_model(self, eos_ids: Iterable[int], date: datetime.date | None) -> Tokenizer:
        """This tokenizer for a model that ends responses with `eos_ids` too, and whose chat template is told `date`."""
        told = copy.copy(self)
        told.eos_ids = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        told.date = date if self.renders_date else None
        return told

    @property
    def renders_date(self) -> bool:
        """Whether the chat template asks for the date (Llama 3.2's does), so that prompts depend on the day."""
        return "strftime_now" in (self._chat_template or "")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added.

        Raises:   DataError if a word-level vocabulary lacks a word, or the tokenizer cannot read the text.
        """
        return self._encoding(text).ids

    def _encoding(self, text: str) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            # The Rust library raises plain Exception, told apart by its text, or panics, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if "Missing [UNK]" not in str(error):
                raise DataError(f"the tokenizer {self.source} cannot read the text: {error}.") from error
            unknown = ", ".join(repr(word) for word in self._unknown_words(text)[:5])
            raise DataError(
                f"words outside the vocabulary of the tokenizer {self.source}: {unknown}; "
                "use a tokenizer that was made for this data."
            ) from error

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text from outside, in which control tokens are what `control_tokens` says.

        Raises:   DataError as `encode` does, and for a control token that is refused or has no other ids.
        """
        found = None if self.control_tokens == "control" else self._control.search(text)
        if found is None:
            return self.encode(text)
        if self.control_tokens == "refuse":
            raise DataError(
                f"{found[0]!r} is a control token of the tokenizer {self.source}; remove it, or set "
                "control_tokens=text (it is its letters) or control_tokens=control (it controls)."
            )
        self._backend.encode_special_tokens = True
        try:
            ids = self.encode(text)
        finally:
            self._backend.encode_special_tokens = False
        if self._backend.token_to_id(found[0]) in ids:
            raise DataError(f"the tokenizer {self.source} has no other ids for {found[0]!r}; remove it.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of `ids`; special tokens, padding among them, are left out."""
        return cast(str, self._fast.decode(list(ids), skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of `ids` with special tokens."""
        return cast(str, self._fast.decode(list(ids), skip_special_tokens=False))

    def difference(self, other: Tokenizer) -> str:
        """The first difference in how both make ids of text, in words; empty for none. Files and names do not count."""
        ours, theirs = (encoding_of(json.loads(each._backend.to_str())) for each in (self, other))
        return first_difference(ours, theirs)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the tokenizer's own chat template, by default up to where the assistant speaks.

        Raises:   ConfigError if the tokenizer has no chat template; DataError if the template refuses the turns, writes
                  nothing or does not end, or a turn has a control token that is refused.
        """
        encoders = (self.encode, self.encode_text)
        pieces = self.rendered(messages, add_generation_prompt).pieces
        return [number for at, piece in enumerate(pieces) for number in encoders[at % 2](piece)]

    def encode_rendered(self, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered conversation, and of each the characters of its text: from, and up to.

        Raises:   DataError as `encode_chat` does.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for at, piece in enumerate(rendered.pieces):
            end = start + len(piece)
            if at % 2:  # the letters of a control token, which nothing divides
                letters = self.encode_text(piece)
                ids, offsets = ids + letters, offsets + [(start, end)] * len(letters)
            else:
                encoding = self._encoding(piece)
                ids += encoding.ids
                offsets += [(start + first, start + last) for first, last in encoding.offsets]
            start = end
        return ids, offsets

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text that `encode_chat` encodes."""
        return self._render(messages, add_generation_prompt, ("", ""))

    def rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        """The same, with what in it is to be told apart."""
        texts = "".join(message["role"] + message["content"] for message in messages)
        marks = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in texts)
        mark, opens, closes = next(marks), next(marks), next(marks)
        turns: Sequence[Message] = messages
        if self.control_tokens != "control" and self._control.search(texts):
            # Control tokens of the turns, and of the template, are told apart by a mark that only the former get.
            def marked(text: str) -> str:
                return self._control.sub(lambda token: mark + token[0] + mark, text)

            turns = [{"role": marked(m["role"]), "content": marked(m["content"])} for m in messages]
        text = self._render(turns, add_generation_prompt, (opens, closes))
        generated = between(text.replace(mark, ""), opens, closes)
        pieces = re.split(f"{mark}({self._control.pattern}){mark}", text.replace(opens, "").replace(closes, ""))
        if any(mark in piece for piece in pieces):
            raise DataError(f"the chat template of {self.source} cuts control tokens of a turn in two; remove them.")
        return Rendered(pieces, generated)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, marks: tuple[str, str]) -> str:
        template = self._chat_template
        if template is None:
            raise ConfigError(
                f"tokenizer has no chat template: {self.source}; add chat_template.jinja, or set template=plain."
            )
        from megarlhf.data.chat_template import render
        from megarlhf.data.template_worker import CLOSES, OPENS

        roles = [message["role"] for message in messages]
        variables = {
            **self._fast.special_tokens_map,
            "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **dict(zip((OPENS, CLOSES), marks, strict=True)),
        }
        try:
            return render(_clock(self.date) + template, variables, trusted=template == LLAMA3_CHAT_TEMPLATE)
        except DataError as error:
            raise DataError(
                f"the chat template of {self.source} refuses the roles {roles}: {error}; mend chat_template.jinja, or "
                "set template=plain."
            ) from error

    def encode_prompt(self, prompt: str | Sequence[Message], template: Template) -> list[int]:
        """Ids that a response follows: the chat template, or (plain, text only) BOS and the bare text.

        Plain saves the tiny models the 9 tokens of Llama 3's headers, a third of their sequence.
        Raises:   DataError, also where that is no token at all.
        """
        if template == "chat":
            ids = self.encode_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        elif isinstance(prompt, str):
            ids = [*([] if self.bos_id is None else [self.bos_id]), *self.encode_text(prompt)]
        else:
            raise DataError("a conversation has no plain form: its turns would run together; set template=chat.")
        if not ids:
            where = f"the chat template of {self.source} writes" if template == "chat" else "the tokenizer makes"
            raise DataError(
                f"{where} nothing of the prompt, but a response needs a token to follow; mend the template."
            )
        return ids

    def encode_response(self, response: str) -> list[int]:
        """Ids of a response with the EOS that ends it, as a sampler would produce them after `encode_prompt`."""
        return [*self.encode_text(response), self.eos_id]

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, for `load_tokenizer` or transformers."""
        self._fast.save_pretrained(directory)

    def _unknown_words(self, text: str) -> list[str]:
        pre_tokenizer = self._backend.pre_tokenizer
        vocabulary = self._fast.get_vocab()
        pieces = pre_tokenizer.pre_tokenize_str(text) if pre_tokenizer else [(text, (0, len(text)))]
        return [word for word, _ in pieces if word not in vocabulary]


def _clock(date: datetime.date | None) -> str:
    """What to put before a chat template for which it shall be midnight of `date`: a `strftime_now` of its own.

    transformers lets no function of ours into a template, but a template may define one.
    """
    if date is None:
        return ""
    fields = [f"%{flag}{letter}" for flag in ("-", "") for letter in _DATE_FIELDS]
    told = "".join(f" | replace({field!r}, {date.strftime(field)!r})" for field in fields)
    return "{%- macro strftime_now(format) -%}{{ format" + told + " }}{%- endmacro -%}"


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read a Hugging Face tokenizer directory.

    Raises:   DataError if the directory is missing, partial or damaged, or needs code of its own.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"tokenizer directory does not exist: {directory}; give a directory that has tokenizer.json.")
    away = link_out(directory)
    if away is not None:
        raise DataError(f"{away} is a link out of {directory}, which is not followed; put the file itself there.")
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (directory / name).is_file()]
    if missing:
        raise DataError(
            f"tokenizer directory is partial: {directory} lacks {' and '.join(missing)}; "
            "copy the missing files from where the model came from."
        )
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, use_fast=True)
    except BaseException as error:  # a damaged file surfaces as almost any type, or panics in the Rust library
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"tokenizer cannot be read: {directory}: {reason}; restore tokenizer.json and tokenizer_config.json "
            "(a tokenizer that needs its own Python code is not supported)."
        ) from error
    return Tokenizer(cast("PreTrainedTokenizerFast", fast), str(directory))


def build_tiny_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer over `words` with Llama 3's special tokens and chat template.

    Words, numbers and marks are one token each; unknown words are errors, not guesses. `decode(encode(text))` is `text`
    where words are separated by one space and . , ? ! follow the word before them.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    special = [BEGIN_OF_TEXT, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN, PAD]
    entries = dict.fromkeys([*special, "\n\n", "system", "user", "assistant", *words])
    # No unknown token on purpose: the backend then raises, which `Tokenizer.encode` turns into an error with the words.
    backend = Backend(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\w+|[^\w\s]"), "removed", invert=True)
    # Joins words with spaces and pulls marks back to the word before; no entry starts with the prefix.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        extra_special_tokens=[END_OF_TEXT, START_HEADER, END_HEADER],
        chat_template=LLAMA3_CHAT_TEMPLATE,
    )
    return Tokenizer(fast, "tiny word-level tokenizer")
