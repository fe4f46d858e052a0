"""The same model in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megarlhf.batch.rollouts import Prompts
from tools.step_bench.workload import EOS, Sizes


def ending(last: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor: EOS is the token at `last` [B] in whole rows, and nowhere else."""

    def processor(tokens: Tensor, scores: Tensor) -> Tensor:
        # 1e9 stands for certainty: EOS where the row ends, anything else before.
        scores[:, EOS] = (2.0 * (last == tokens.shape[1]) - 1.0) * 1e9
        return scores

    return processor


class Peer:
    """The same model in transformers."""

    def __init__(self, directory: Path, sizes: Sizes, prompts: Prompts, device: torch.device) -> None:
        from transformers import LlamaForCausalLM

        self.sizes, self.prompts = sizes, prompts.tokens.to(device)
        model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def generate(self, response_lengths: Tensor) -> Tensor:
        """Tokens [B, prompt + N], pure sampling; rows end at `response_lengths` [B]."""
        # Rows of full length need no EOS, and then nothing is spent on forcing one.
        ragged = bool((response_lengths < self.sizes.new_tokens).any())
        return self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=self.sizes.group,
            max_new_tokens=self.sizes.new_tokens,
            eos_token_id=EOS if ragged else None,
            pad_token_id=EOS,
            logits_processor=[ending(self.sizes.prompt_tokens + response_lengths - 1)] if ragged else [],
        )

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> None:
        """Logits of every position, in micro-batches."""
        for rows in inputs.split(self.sizes.peer_micro_batch):
            self.model(rows, use_cache=False)

    def train(self, inputs: Tensor, labels: Tensor, mask: Tensor) -> None:
        """One AdamW step on the mean cross entropy of the labels in `mask`."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = [x.split(self.sizes.peer_micro_batch) for x in (inputs, labels, mask)]
        for rows, targets, chosen in zip(*parts, strict=True):
            logits = self.model(rows, use_cache=False).logits
            (cross_entropy(logits[chosen], targets[chosen], reduction="sum") / mask.sum()).backward()
        self.optimizer.step()
