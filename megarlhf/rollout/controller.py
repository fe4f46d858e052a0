"""One decoding step: forward, draw, record. Results stay in tensors; no request object is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.communication_utils import is_pipeline_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megarlhf.models.transformer import LlamaModel
from megarlhf.rollout.context import RolloutContext
from megarlhf.rollout.megatron_engine import EngineController
from megarlhf.rollout.sampling import SamplingConfig, sample


@dataclass(frozen=True)
class Ledger:
    """What a rollout is drawn from and written to; column t is about the token at position t of its row.

    Shapes:   tokens [B, W] int64, prompts filled in; logprobs, uniforms [B, W] fp32; starts, lengths [B] int64, the
              tokens of the prompt, and those known so far.
    """

    tokens: Tensor
    logprobs: Tensor
    uniforms: Tensor
    starts: Tensor
    lengths: Tensor


class RolloutController(EngineController):
    """Draws all rows at once, with each row's own random numbers, and writes what was drawn into the ledger.

    Ranks:    the last pipeline stage draws, on every tensor rank alike, and tells the other stages.
    """

    def __init__(
        self,
        model: LlamaModel,
        context: RolloutContext,
        groups: ProcessGroupCollection,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
    ) -> None:
        super().__init__(model, context, groups)
        self.ledger: Ledger
        """Of the rollout that is drawn."""
        self.sampling: SamplingConfig
        """How."""
        self.vocab_size = vocab_size
        self.ends = torch.tensor(eos_ids, device=torch.cuda.current_device())

    @torch.inference_mode()
    async def async_generate_output_tokens_dynamic_batch(self) -> Any:
        """Run every active row one token further."""
        context = self.inference_wrapped_model.inference_context
        assert isinstance(context, RolloutContext)
        tokens, positions = self.step()
        logits = self.inference_wrapped_model.run_one_forward_step(
            {"tokens": tokens, "position_ids": positions, "attention_mask": None}
        )
        continues = context.fork() if context.unforked else None
        active = slice(context.paused_request_count, context.total_request_count)
        # Of the books, which may lie on the host.
        rows = context.request_ids[active].to(self.ends.device).long()
        lengths = context.get_active_sequence_lengths().to(self.ends.device).long()
        cells = rows * self.ledger.tokens.shape[1] + lengths
        drawn, logprobs = self._draw(logits, continues, cells)
        going_on = ~torch.isin(drawn, self.ends)
        if continues is not None:
            # Where a row was made as of before the end of its prompt, what comes next is known.
            known = lengths < self.ledger.starts[rows]
            drawn = torch.where(known, self.ledger.tokens.view(-1)[cells], drawn)
            logprobs = logprobs.masked_fill(known, 0.0)
            going_on |= known
        self.ledger.tokens.view(-1)[cells] = drawn
        self.ledger.logprobs.view(-1)[cells] = logprobs
        lengths += 1
        self.ledger.lengths[rows] = lengths
        going_on &= lengths < context.get_max_sequence_lengths().to(lengths.device)
        context.update_requests(going_on.byte(), drawn)
        return self.ran(decode_only=continues is None)

    def _draw(self, logits: Tensor, continues: Tensor | None, cells: Tensor) -> tuple[Tensor, Tensor]:
        """[rows] tokens and log-probs; `logits` [1, rows before forking and padding, padded vocabulary] on
        the last stage."""
        group = self.pp_group
        if is_pipeline_last_stage(group):
            # Columns past the vocabulary exist because tensor parallelism pads; rows past the active ones where a
            # graph does, from Megatron-Core 0.18 on.
            scores = logits[0, :, : self.vocab_size]
            tokens, logprobs = sample(
                scores[: len(cells)] if continues is None else scores[continues],
                self.ledger.uniforms.view(-1)[cells],
                temperature=self.sampling.temperature,
                top_k=self.sampling.top_k,
                top_p=self.sampling.top_p,
            )
            if group.size() == 1:
                return tokens, logprobs
            packed = torch.stack([tokens.double(), logprobs.double()])
        else:
            packed = torch.empty((2, len(cells)), dtype=torch.float64, device=cells.device)
        # Two numbers a row instead of its logits; fp64 holds token ids exactly.
        dist.broadcast(packed, group=group, group_src=group.size() - 1)
        return packed[0].long(), packed[1].float()
