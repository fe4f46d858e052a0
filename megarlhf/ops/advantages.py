"""Advantages: how much better a token was than the critic expected."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask


@torch.no_grad()
def gae(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, terminated: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens, masked positions skipped.

        delta_t = r_t + gamma * V_{t+1} - V_t       A_t = delta_t + gamma * lam * A_{t+1}       return_t = A_t + V_t

    V_t is the critic's value before token t + 1 is produced. After the last response token V is 0 when the rollout
    ended with EOS (`terminated`); when it was cut, it is the value at the last response position, the closest state
    that the critic has seen, since the text after the last token is not part of the rollout.

    Shapes:   token_level_rewards, values [B, T] fp32; response_mask [B, T] bool; terminated [B] bool.
              Returns (advantages, returns) [B, T] fp32, without gradient: they are targets.
    Units:    reward. Masked positions of both outputs are exactly 0, and their inputs are never read.
    Raises:   ValueError if shapes differ or a mask is not bool.
    Source:   Schulman et al. 2016, eq. 11-16. Differs: masked gaps carry A and V across unchanged.
    """
    check_mask(response_mask, token_level_rewards=token_level_rewards, values=values)
    if terminated.dtype != torch.bool or terminated.shape != values.shape[:1]:
        got = f"{terminated.dtype} {list(terminated.shape)}"
        raise ValueError(f"terminated: got {got}, values are {list(values.shape)}; must be torch.bool, one a row.")
    following, exists = _next_response(response_mask)
    bootstrap = torch.where(terminated[:, None], 0.0, values)
    next_values = torch.where(exists, values.gather(1, following), bootstrap)
    deltas = torch.where(response_mask, token_level_rewards + gamma * next_values - values, 0.0)
    decay = torch.where(response_mask, gamma * lam, 1.0).to(deltas.dtype)
    advantages = torch.where(response_mask, _reverse_scan(deltas, decay), 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def _next_response(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the first response position after t, and whether there is one: both [B, T]."""
    positions = mask.shape[1]
    index = torch.where(mask, torch.arange(positions, device=mask.device), positions)
    at_or_after = index.flip(1).cummin(1).values.flip(1)
    after = torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=positions)
    return after.clamp(max=positions - 1), after < positions


def _reverse_scan(b: Tensor, a: Tensor) -> Tensor:
    """x_t = b_t + a_t * x_{t+1} in log2(T) doublings: after k of them x_t covers 2^k terms.

    It multiplies decays and never divides by them, so that gamma * lam = 1 and gamma * lam = 1e-8 are both exact.
    """
    x, a, step = b.clone(), a.clone(), 1
    while step < x.shape[1]:
        # The right-hand sides are complete before the assignment: every term is the previous doubling's.
        x[:, :-step] = x[:, :-step] + a[:, :-step] * x[:, step:]
        a[:, :-step] = a[:, :-step] * a[:, step:]
        step *= 2
    return x
