"""Kernels of megarlhf: torch and triton only, usable without the rest of the library.

| function | from, to |
|---|---|
| `token_logprob` | logits -> log-prob of each label, entropy |
| `linear_logprob` | hidden states -> the same, without an [N, V] tensor |
| `linear_ppo` | hidden states -> the policy loss of PPO, GRPO or CISPO, with three matrix products |
| `full_kl` | two models' logits -> exact KL of each token |
| `linear_kl` | two models' hidden states -> the same, without an [N, V] tensor |
| `rewards_gae` | log-probs, values, scores -> token-level rewards, advantages, returns, moments for whitening |
| `clipped_policy_loss`, `clipped_value_loss`, `kl_loss` | per-token numbers -> loss and metrics, a KL's term |
| `paged_prefill`, `paged_decode` | attention over a paged KV cache, under flash-attn's argument names |

Each takes `impl`: "auto" runs Triton on a GPU and the torch reference elsewhere (`dispatch`).
"""

from megarlhf_kernels._shards import Shard
from megarlhf_kernels.full_kl import full_kl
from megarlhf_kernels.linear_kl import Projected, linear_kl
from megarlhf_kernels.linear_logprob import linear_logprob
from megarlhf_kernels.linear_ppo import Anchor, PolicyTerms, kl_loss, linear_ppo
from megarlhf_kernels.paged_attention import paged_decode, paged_prefill
from megarlhf_kernels.policy_value_loss import Clip, clipped_policy_loss, clipped_value_loss
from megarlhf_kernels.rewards_gae import Discount, Estimate, Shaping, mean_and_variance, rewards_gae
from megarlhf_kernels.token_logprob import token_logprob

__all__ = [
    "Anchor",
    "Clip",
    "Discount",
    "Estimate",
    "PolicyTerms",
    "Projected",
    "Shaping",
    "Shard",
    "clipped_policy_loss",
    "clipped_value_loss",
    "full_kl",
    "kl_loss",
    "linear_kl",
    "linear_logprob",
    "linear_ppo",
    "mean_and_variance",
    "paged_decode",
    "paged_prefill",
    "rewards_gae",
    "token_logprob",
]
