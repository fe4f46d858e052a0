"""The stages of the pipeline as types: frozen, shape-checked, no optional fields (DESIGN sentences 4 and 5).

B rows, T predicted positions (padded length - 1), P prompts or pairs. Rows are right-padded, and every per-token
tensor is [B, T], where index t is about token t + 1: the shift from tokens to labels happens here and nowhere else.
Every type checks dtypes, shapes and lengths when it is built, which on a GPU waits for the device once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """What every stage can do: move to a device, select rows, drop padding."""

    def to(self, device: torch.device | str) -> Self:
        """The same rows with every tensor on `device`."""
        return type(self)(**{name: _to(value, device) for name, value in vars(self).items()})

    def rows(self, index: Tensor | slice) -> Self:
        """The rows that `index` (int64 [n], or a slice) selects, in its order."""
        return type(self)(**{name: _take(value, index) for name, value in vars(self).items()})

    def padded_to(self, positions: int) -> Self:
        """The same rows with T = `positions`, no less than now. New tokens are 0: no mask ever reads them."""
        return type(self)(**{name: _pad(name, value, positions) for name, value in vars(self).items()})

    def trimmed(self, positions: int) -> Self:
        """The same rows with T = `positions`, which must reach every row's last token."""
        return type(self)(**{name: _trim(name, value, positions) for name, value in vars(self).items()})


class TokenRows(Protocol):
    """Any batch whose rows are sequences of tokens: what the pipeline driver and the collectives ask for."""

    @property
    def tokens(self) -> Tensor:
        """[B, T+1]."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[B], or [2B] where a row is a pair of sequences."""
        ...

    def __len__(self) -> int: ...
    def rows(self, index: Tensor | slice) -> Self:
        """Select rows."""
        ...

    def trimmed(self, positions: int) -> Self:
        """Drop padding."""
        ...

    def padded_to(self, positions: int) -> Self:
        """Add padding."""
        ...


RowsT = TypeVar("RowsT", bound=TokenRows)


@dataclass(frozen=True, eq=False)
class Prompts(Batch):
    """Conditioning text to roll out.

    Shapes:   tokens [P, L] int64 right-padded; lengths [P] int64 in 1..L; ids [P] int64; answers: P strings.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tensor
    lengths: Tensor
    ids: Tensor
    """Row of the data set: with the sample's index it seeds the rollout, whatever the batch it is in."""
    answers: tuple[str, ...]
    """Expected answers for verifiers, "" where unknown."""

    def __post_init__(self) -> None:
        count, width = _check_tokens(self, self.tokens)
        _check(self, "lengths", self.lengths, torch.int64, (count,))
        _check(self, "ids", self.ids, torch.int64, (count,))
        _check_answers(self, self.answers, count)
        _check_range(self, "lengths", self.lengths, 1, width)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def repeat(self, group_size: int) -> Prompts:
        """Each prompt `group_size` times, copies adjacent."""
        count = len(self)
        return self.rows(torch.arange(count, device=self.tokens.device).repeat_interleave(group_size))


@dataclass(frozen=True, eq=False)
class Rollout(Batch):
    """Prompts with one response each, and what the sampler said about it.

    Shapes:   tokens [B, T+1] int64, prompt directly followed by response, right-padded; prompt_lengths, lengths,
              prompt_ids [B] int64; terminated [B] bool; sampler_logprobs [B, T] fp32; answers: B strings.
    Units:    sampler_logprobs in nats, 0 where there is no response token.
    Raises:   ValueError naming the field and both shapes, or lengths outside 1 <= prompt <= length <= T+1.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    """Prompt plus response, EOS included."""
    terminated: Tensor
    """True when the response ended with EOS, False when it was cut at the token limit."""
    sampler_logprobs: Tensor
    prompt_ids: Tensor
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        count, width = _check_tokens(self, self.tokens)
        for name in ("prompt_lengths", "lengths", "prompt_ids"):
            _check(self, name, vars(self)[name], torch.int64, (count,))
        _check(self, "terminated", self.terminated, torch.bool, (count,))
        _check(self, "sampler_logprobs", self.sampler_logprobs, torch.float32, (count, width - 1))
        _check_answers(self, self.answers, count)
        _check_range(self, "prompt_lengths", self.prompt_lengths, 1, self.lengths)
        _check_range(self, "lengths", self.lengths, 1, width)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def inputs(self) -> Tensor:
        """[B, T]: what the model reads; position t sees tokens 0..t."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """[B, T]: what it predicts; labels[:, t] is token t + 1."""
        return self.tokens[:, 1:]

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: True where the label is a response token (EOS in, prompt and padding out)."""
        token = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return (token >= self.prompt_lengths[:, None]) & (token < self.lengths[:, None])

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64."""
        return self.lengths - self.prompt_lengths


@dataclass(frozen=True, eq=False)
class Experience(Batch):
    """Rollouts with everything the optimiser needs.

    Shapes:   logprobs, ref_logprobs, values, advantages, returns [B, T] fp32, as `rollout.labels`.
    Units:    log-probs in nats; values and returns in reward; advantages whitened.
    Raises:   ValueError naming the field and both shapes.
    """

    rollout: Rollout
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.rollout.labels.shape)
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
            _check(self, name, vars(self)[name], torch.float32, shape)

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def tokens(self) -> Tensor:
        """[B, T+1]: the rollout's."""
        return self.rollout.tokens

    @property
    def lengths(self) -> Tensor:
        """[B]: the rollout's."""
        return self.rollout.lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: the rollout's."""
        return self.rollout.response_mask

    def mini_batches(self, size: int, generator: torch.Generator) -> Iterator[Experience]:
        """Every row once: a permutation from `generator` (a CPU one), cut into consecutive chunks of `size`.

        Raises:   ValueError if `size` does not divide the rows, since a short last chunk would weigh its rows more.
        """
        count = len(self)
        if size < 1 or count % size:
            raise ValueError(f"mini_batches: {count} rows do not divide into chunks of {size}; choose a divisor.")
        order = torch.randperm(count, generator=generator).to(self.logprobs.device)
        for chunk in order.split(size) if count else ():
            yield self.rows(chunk)


@dataclass(frozen=True, eq=False)
class TokenBatch(Batch):
    """Text with supervised positions, for SFT.

    Shapes:   tokens [B, T+1] int64 right-padded; lengths [B] int64; loss_mask [B, T] bool, as `labels`.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tensor
    lengths: Tensor
    loss_mask: Tensor
    """True where the label is supervised; padding must be out."""

    def __post_init__(self) -> None:
        count, width = _check_tokens(self, self.tokens)
        _check(self, "lengths", self.lengths, torch.int64, (count,))
        _check(self, "loss_mask", self.loss_mask, torch.bool, (count, width - 1))
        _check_range(self, "lengths", self.lengths, 1, width)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def inputs(self) -> Tensor:
        """[B, T]: what the model reads."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """[B, T]: what it predicts; labels[:, t] is token t + 1."""
        return self.tokens[:, 1:]

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: `loss_mask`, by the name it has where responses are sampled."""
        return self.loss_mask


@dataclass(frozen=True, eq=False)
class PreferencePairs(Batch):
    """Pairs of responses to one prompt: the chosen one in rows 0, 2, 4, ..., its rejected twin in the row below.

    Interleaved, so that any even split of the rows keeps pairs together. `rows` selects pairs, not sequences.

    Shapes:   tokens [2P, T+1] int64 right-padded; lengths [2P] int64; weight [P] fp32 (loss weight of a pair).
              A sequence's score is read at its last real token, index `lengths - 1` of `tokens`.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tensor
    lengths: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        count, width = _check_tokens(self, self.tokens)
        if count % 2:
            raise ValueError(f"PreferencePairs.tokens: {count} rows; chosen and rejected must alternate, 2 a pair.")
        _check(self, "lengths", self.lengths, torch.int64, (count,))
        _check(self, "weight", self.weight, torch.float32, (count // 2,))
        _check_range(self, "lengths", self.lengths, 1, width)

    def __len__(self) -> int:
        return self.weight.shape[0]

    def rows(self, index: Tensor | slice) -> PreferencePairs:
        """The pairs that `index` (int64 [n], or a slice) selects, in its order."""
        pairs = torch.arange(len(self), device=self.tokens.device)[index]
        sequences = torch.stack((2 * pairs, 2 * pairs + 1), dim=1).flatten()
        return PreferencePairs(self.tokens[sequences], self.lengths[sequences], self.weight[index])


@dataclass(frozen=True, eq=False)
class LabelledResponses(Batch):
    """Responses judged one by one.

    Shapes:   tokens [B, T+1] int64 right-padded; lengths [B] int64; correct [B] fp32 in 0..1 (soft labels allowed);
              weight [B] fp32 (loss weight). The score is read at the last real token, index `lengths - 1`.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tensor
    lengths: Tensor
    correct: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        count, width = _check_tokens(self, self.tokens)
        _check(self, "lengths", self.lengths, torch.int64, (count,))
        _check(self, "correct", self.correct, torch.float32, (count,))
        _check(self, "weight", self.weight, torch.float32, (count,))
        _check_range(self, "lengths", self.lengths, 1, width)

    def __len__(self) -> int:
        return self.tokens.shape[0]


def cat(parts: Sequence[RowsT]) -> RowsT:
    """All rows of batches of one type, in order, padded to the longest T."""
    longest = max(part.tokens.shape[1] for part in parts) - 1
    return _join([part.padded_to(longest) for part in parts])


def _to(value: Tensor | Batch | tuple[str, ...], device: torch.device | str) -> Any:
    return value if isinstance(value, tuple) else value.to(device)


def _take(value: Any, index: Tensor | slice) -> Any:
    if isinstance(value, Batch):
        return value.rows(index)
    if isinstance(value, tuple) and isinstance(index, Tensor):
        return tuple(value[i] for i in index.tolist())
    return value[index]


def _pad(name: str, value: Any, positions: int) -> Any:
    if isinstance(value, Batch):
        return value.padded_to(positions)
    if isinstance(value, tuple) or value.ndim < 2:
        return value
    width = positions + 1 if name == "tokens" else positions
    if value.shape[1] > width:
        raise ValueError(f"padded_to: {name} has width {value.shape[1]}, asked for {width}; padding cannot shorten.")
    return torch.nn.functional.pad(value, (0, width - value.shape[1]))


def _trim(name: str, value: Any, positions: int) -> Any:
    if isinstance(value, Batch):
        return value.trimmed(positions)
    if isinstance(value, tuple) or value.ndim < 2:
        return value
    return value[:, : positions + 1] if name == "tokens" else value[:, :positions]


def _join(values: list) -> Any:
    if isinstance(values[0], Batch):
        columns = [vars(value) for value in values]
        return type(values[0])(**{name: _join([column[name] for column in columns]) for name in columns[0]})
    return sum(values, ()) if isinstance(values[0], tuple) else torch.cat(values)


def _check(owner: Batch, field: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{type(owner).__name__}.{field}: got {got}; must be {dtype} {list(shape)}.")


def _check_tokens(owner: Batch, tokens: Tensor) -> tuple[int, int]:
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[1] < 1:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"{type(owner).__name__}.tokens: got {got}; must be torch.int64 [rows, 1 or more tokens].")
    return tokens.shape[0], tokens.shape[1]


def _check_answers(owner: Batch, answers: tuple[str, ...], count: int) -> None:
    if not isinstance(answers, tuple) or len(answers) != count:
        got = f"{type(answers).__name__} of {len(answers)}"
        raise ValueError(f'{type(owner).__name__}.answers: got {got}; must be a tuple of {count} strings ("" unknown).')


def _check_range(owner: Batch, field: str, value: Tensor, low: int, high: Tensor | int) -> None:
    outside = (value < low) | (value > high)
    if outside.any():
        row = int(outside.nonzero()[0])
        top = int(high[row]) if isinstance(high, Tensor) else high
        raise ValueError(f"{type(owner).__name__}.{field}: row {row} is {int(value[row])}; must be in {low}..{top}.")
