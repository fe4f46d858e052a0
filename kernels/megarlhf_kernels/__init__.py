"""Kernels of megarlhf: torch and triton only, usable without the rest of the library."""

from megarlhf_kernels._shards import Shard
from megarlhf_kernels.linear_logprob import linear_logprob
from megarlhf_kernels.linear_ppo import PolicyTerms, linear_ppo
from megarlhf_kernels.token_logprob import token_logprob

__all__ = ["PolicyTerms", "Shard", "linear_logprob", "linear_ppo", "token_logprob"]
