"""The KL between two language models over the whole vocabulary, one of them resident at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megarlhf.batch.base import TokenRows
from megarlhf.models.readings import BeforeResponses, ResponseRows
from megarlhf.models.role import Role
from megarlhf.models.transformer import LlamaModel
from megarlhf.parallel.micro_batches import States
from megarlhf_kernels import Projected


def exact_kl(policy: Role, reference: Role, rows: TokenRows, *, temperature: float) -> Tensor:
    """KL(policy || reference) of the next token at every response token, given what stands before it.

        sum over v of p(v) (log p(v) - log q(v)),  p and q the softmax of logits / temperature

    Of what the policy drew, its mean is what the mean of `kl_k1` estimates, without that estimate's variance.

    Shapes:   [B, T] fp32, 0 outside of responses.
    Memory:   the policy's states of its data rank's responses, [n, H], and its projection wait on the host meanwhile.
    Ranks:    collective; every rank passes the same rows and gets the same numbers. Both roles are on one mesh.
    """
    waiting = _Waiting()
    policy.read(rows, waiting)
    return reference.read(rows, _ToReference(waiting, temperature), dealt_as=policy)


@dataclass
class _Waiting(BeforeResponses):
    """Keeps on the host what a policy's distributions are made of: of each micro-batch, in their order."""

    hidden: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)

    def __call__(self, model: LlamaModel, states: States, rows: ResponseRows) -> Tensor:
        """[n] zeros."""
        self.hidden.append(states.hidden.to("cpu", copy=True))
        if not self.weight:
            self.weight.append(model.vocab_weight.detach().to("cpu", copy=True))
        return torch.zeros(states.count, device=states.hidden.device)


@dataclass(frozen=True)
class _ToReference(BeforeResponses):
    """The KL of what waits to the model that is read: rows are cut alike, so that its micro-batches are the same."""

    policy: _Waiting
    temperature: float

    def __call__(self, model: LlamaModel, states: States, rows: ResponseRows) -> Tensor:
        """[n] fp32."""
        policy, device = self.policy, states.hidden.device
        policy.weight[0] = policy.weight[0].to(device)  # once: it stays for the micro-batches to come
        waiting = Projected(policy.hidden.pop(0).to(device), policy.weight[0])
        return model.policy_kl(states.hidden, waiting, temperature=self.temperature)
