"""`megarlhf score`: what a model says of given responses, added to the rows of a JSON lines file.

A language model adds `logprobs`, one natural logarithm a predicted token at `sampling.temperature`, and `logprob_sum`,
their sum. A reward model adds `score`, its offset and scale applied. data/score_rows.py says which rows there are and
which of their tokens are predicted: those of the response with its EOS, or every token id but the first. A number that
is not finite becomes null, since JSON has no word for it.

Rows are scored in parts and written part by part. The same command again goes on after the last whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.commands.row_file import DAY, RowFile, finite, numbers_of, output_file, who_reads
from megarlhf.config import Config
from megarlhf.data.score_rows import ScoreSet, load_score_rows
from megarlhf.data.tokenizer import ControlTokens, Template, Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.observe.progress import Progress
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.measuring import PART_ROWS
from megarlhf.runtime.checks import Model, check_budget, check_tokenizer, checked_model, resolve_tokenizer
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen, print_choices
from megarlhf.runtime.said import say, told_day
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, chosen_template

ADDED = {"language": ("logprobs", "logprob_sum"), "scalar": ("score",)}
"""Fields that are added to a row, by the model's head."""


class Rendering(Config):
    """How the texts of a row become tokens."""

    template: Template | None = None
    """How a prompt is rendered: `chat` (the tokenizer's template) or `plain` (BOS and the text, for tiny models); null
    for what the model was trained with, or chat where nobody knows."""
    control_tokens: ControlTokens = "refuse"
    """What a control token in a text, such as <|eot_id|>, is: an error that names the row (`refuse`), its letters
    (`text`), or what ends turns and responses (`control`)."""


class Drawing(Config):
    """How responses are taken to have been drawn."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of a language model before its log-probs; 1 is the model itself."""


class ScoreConfig(RanksConfig):
    """`megarlhf score`: log-probs of given responses, or a reward model's scores."""

    first: ClassVar[tuple[str, ...]] = (
        *("model", "input", "output", "prompts.template", "sampling.temperature", "micro_batch", "layout.data"),
        "layout.tensor",
    )

    model: str
    """Directory of a language or a reward model, Hugging Face or megarlhf; or a preset, drawn at random from `seed`.
    A language model adds logprobs (nats, one a predicted token) and logprob_sum to each row, a reward model score."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own; rows of ids
    need none."""
    input: Path
    """JSON lines file. A row has prompt (text or a conversation) and response, whose tokens are predicted, EOS in; or
    messages, a conversation whose last turn, the assistant's, is predicted likewise; or tokens, a list of ids of which
    all but the first are predicted. It may have other fields too."""
    output: Path
    """JSON lines file to write: every row of the input with all its fields, in order, and what is added. Where it is
    there already the same command goes on with it, and any other is refused."""
    prompts: Rendering = Rendering()
    """How the texts of a row become tokens."""
    sampling: Drawing = Drawing()
    """How the responses are taken to have been drawn."""

    def decisive(self, own: Template | None = None) -> dict[str, Any]:
        """The settings that decide what is added to a row, by name. The layout is none: it changes rounding at most.

        own: what the model was trained with.
        """
        return {
            **who_reads(self.model, self.tokenizer),
            "prompts.template": self.prompts.template or own or "chat",
            "prompts.control_tokens": self.prompts.control_tokens,
            "sampling.temperature": self.sampling.temperature,
            **numbers_of(self),
        }


@dataclass(frozen=True)
class ScoreInputs:
    """Everything that was read and checked before the model is built."""

    model: ModelDescription
    tokenizer: Tokenizer | None
    """None where every row has ids."""
    rows: ScoreSet
    output: RowFile


def prepare(cfg: ScoreConfig) -> ScoreInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    if cfg.input.suffix != ".jsonl":
        raise ConfigError(f"input={cfg.input} is not a .jsonl file; write one JSON object a line, and name it so.")
    model = checked_model(cfg.model, cfg.layout, "model", needs="scalar")
    reader = Model("model", cfg.model, model)
    settings = cfg.decisive(model.template)
    output = output_file(cfg.output, settings, ADDED[model.head])
    output.check_writable()

    @cache
    def tokenizer() -> Tokenizer:
        # An output that is gone on with after midnight has rows of one day.
        found = resolve_tokenizer(cfg.tokenizer, reader, cfg.date or output.day())
        check_tokenizer(found, model.spec, "model")
        return found.taking(cfg.prompts.control_tokens)

    rows = load_score_rows(cfg.input, tokenizer, settings["prompts.template"])
    longest = rows.check(model.spec.vocab_size, model.spec.max_positions, output.added)
    check_budget(f"a row of input={cfg.input}", longest, cfg)
    used = tokenizer() if tokenizer.cache_info().currsize else None
    if used is not None and used.date is not None:
        output = replace(output, settings={**settings, DAY: str(used.date)})
    done = output.done(rows.rows)
    output.check_room(rows.rows[done.rows :])
    return ScoreInputs(model, used, rows, output)


def main(cfg: ScoreConfig, argv: Sequence[str]) -> int:
    """`megarlhf score`."""
    return on_ranks(cfg, argv, prepare, run)


def run(cfg: ScoreConfig, inputs: ScoreInputs, mesh: Mesh) -> None:
    """Score what the output lacks and write it. Collective: every rank of the layout calls it."""
    if inputs.tokenizer is not None:
        check_one_day(inputs.tokenizer, mesh)
    with sole_writer(lock_of_file(cfg.output), "output", cfg.output, mesh):
        # Again: since the input was checked, another process may have written it.
        done = on_main(lambda: inputs.output.done(inputs.rows.rows), mesh)
        left = len(inputs.rows) - done.rows
        say(inputs.output.said(done, len(inputs.rows)), mesh)
        if not left:
            return
        model = build(cfg, inputs.model, mesh)
        reader = Model("model", cfg.model, inputs.model)
        used, own = chosen_template(cfg.prompts.template, reader), inputs.model.template
        say([f"{cfg.input}: {len(inputs.rows):,} rows, template {used}"], mesh)
        say(
            [f"prompts.template is {used}, but {reader} was trained with {own}"] if own not in (None, used) else [],
            mesh,
        )
        say(told_day(inputs.tokenizer), mesh)
        print_choices(model.settings.compute.choices, mesh)
        opened = inputs.output.open_after(done) if mesh.is_main else nullcontext()
        with opened as file, Progress(left, "score", enabled=mesh.is_main) as bar:
            for part, fields in scored_parts(model, inputs.rows, done.rows):
                if file is not None:
                    inputs.output.write(file, [inputs.rows.rows[index] for index in part], fields)
                bar.advance(len(part))


def build(cfg: ScoreConfig, described: ModelDescription, mesh: Mesh) -> FrozenRole:
    """The model, with the reading that its head has."""
    scores = described.scores()
    reading = LabelLogprobs(cfg.sampling.temperature) if described.head == "language" else scores
    return frozen("model", Model("model", cfg.model, described), reading, cfg, mesh)


def scored_parts(model: FrozenRole, rows: ScoreSet, done: int) -> Iterator[tuple[range, list[dict[str, Any]]]]:
    """Part by part, the rows after the first `done` and what is added to each. Collective; equal on every rank.

    A part starts at a multiple of its size, and the first is scored whole even if some of it is done: a row then has
    the same neighbours, and the same last bits, whether or not the run was interrupted.
    """
    for first in range(done - done % PART_ROWS, len(rows), PART_ROWS):
        part = range(first, min(first + PART_ROWS, len(rows)))
        fields = score_part(model, rows, part)
        known = max(done - first, 0)
        yield part[known:], fields[known:]


def score_part(model: FrozenRole, rows: ScoreSet, part: range) -> list[dict[str, Any]]:
    """What is added to each row of `part`. Collective; equal on every rank."""
    batch = rows.batch(part)
    scores = model.score(batch).cpu()
    if model.head == "scalar":
        return [{"score": finite(score)} for score in scores.tolist()]
    logprobs = [row[mask].tolist() for row, mask in zip(scores, batch.response_mask, strict=True)]
    return [{"logprobs": [*map(finite, row)], "logprob_sum": finite(sum(row))} for row in logprobs]
