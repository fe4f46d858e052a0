"""What models learn from with labels: text, pairs, judged responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megarlhf.batch.base import (
    Batch,
    RowNumbers,
    SequenceCounts,
    SequenceNumbers,
    TokenMask,
    TokenNumbers,
    Tokens,
    TokensMask,
    TokensNumbers,
    response_labels,
)


@dataclass(frozen=True, eq=False)
class TokenBatch(Batch):
    """Text with supervised positions, for SFT.

    Shapes:   tokens [B, T+1] int64 right-padded; lengths [B] int64; loss_mask [B, T] bool, as `labels`.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tokens
    lengths: SequenceCounts
    loss_mask: TokenMask
    """True where the label is supervised; padding must be out."""

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: `loss_mask`, by the name it has where responses are sampled."""
        return self.loss_mask


@dataclass(frozen=True, eq=False)
class PreferencePairs(Batch):
    """Pairs of responses to one prompt: the chosen one in rows 0, 2, 4, ..., its rejected twin in the row below.

    Interleaved, so that any even split of the rows keeps pairs together. `rows` selects pairs, not sequences.

    Shapes:   tokens [2P, T+1] int64, prompt directly followed by response, right-padded; prompt_lengths, lengths [2P]
              int64; weight [P] fp32 (loss weight of a pair). A sequence's score is read at its last real token, index
              `lengths - 1` of `tokens`.
    Raises:   ValueError naming the field and both shapes, or lengths outside 1 <= prompt <= length <= T+1.
    """

    sequences_per_row: ClassVar[int] = 2

    tokens: Tokens
    prompt_lengths: SequenceCounts
    lengths: SequenceCounts
    """Prompt plus response, EOS included."""
    weight: RowNumbers

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("prompt_lengths", self.prompt_lengths, 1, self.lengths)

    @property
    def response_mask(self) -> Tensor:
        """[2P, T] bool: True where the label is a response token (EOS in, prompt and padding out)."""
        return response_labels(self.tokens, self.prompt_lengths, self.lengths)


@dataclass(frozen=True, eq=False)
class AnchoredPairs(Batch):
    """Preference pairs, and what a reference says of them.

    Shapes:   ref_logprobs [2P, T] fp32, as `pairs.labels`, in nats; 0 where there is no response token.
    Raises:   ValueError naming the field and both shapes.
    """

    sequences_per_row: ClassVar[int] = 2

    pairs: PreferencePairs
    ref_logprobs: TokenNumbers

    @property
    def tokens(self) -> Tensor:
        """[2P, T+1]: the pairs'."""
        return self.pairs.tokens

    @property
    def lengths(self) -> Tensor:
        """[2P]: the pairs'."""
        return self.pairs.lengths

    @property
    def response_mask(self) -> Tensor:
        """[2P, T] bool: the pairs'."""
        return self.pairs.response_mask


@dataclass(frozen=True, eq=False)
class LabelledResponses(Batch):
    """Responses judged one by one.

    Shapes:   tokens [B, T+1] int64 right-padded; lengths [B] int64; correct [B] fp32 in 0..1 (soft labels allowed);
              weight [B] fp32 (loss weight). The score is read at the last real token, index `lengths - 1`.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tokens
    lengths: SequenceCounts
    correct: SequenceNumbers
    weight: SequenceNumbers


@dataclass(frozen=True, eq=False)
class Couples(Batch):
    """Couples of sequences, in sequences 2i and 2i + 1: a preference pair, or two judged responses side by side.

    Shapes:   tokens [2C, T+1] int64; lengths [2C]; pair_weight [C] fp32; correct, point_weight [2C] fp32.
    """

    sequences_per_row: ClassVar[int] = 2

    tokens: Tokens
    lengths: SequenceCounts
    pair_weight: RowNumbers
    correct: SequenceNumbers
    point_weight: SequenceNumbers


@dataclass(frozen=True, eq=False)
class SteppedResponses(Batch):
    """Responses whose steps are judged one by one.

    Shapes:   tokens [B, T+1] int64 right-padded; lengths [B] int64; step_ends [B, T+1] bool: the last token of a step.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tokens
    lengths: SequenceCounts
    step_ends: TokensMask


@dataclass(frozen=True, eq=False)
class JudgedSteps(SteppedResponses):
    """Responses of whose steps it is known what they are worth.

    Shapes:   step_labels [B, T+1] fp32 in 0..1 (soft labels allowed); step_weight [B, T+1] fp32: the loss weight of the
              step that ends there, 0 where none does or where it has no label.
    Raises:   ValueError naming the field and both shapes.
    """

    step_labels: TokensNumbers
    step_weight: TokensNumbers


@dataclass(frozen=True, eq=False)
class SteppedCouples(Couples):
    """Couples of sequences of which some have judged steps; every sequence is read at its last token too.

    Shapes:   step_ends [2C, T+1] bool: where sequences are read; step_labels, step_weight [2C, T+1] fp32.
    Raises:   ValueError naming the field and both shapes.
    """

    step_ends: TokensMask
    step_labels: TokensNumbers
    step_weight: TokensNumbers
