"""Kernels of megarlhf: torch and triton only, usable without the rest of the library."""

from megarlhf_kernels.token_logprob import token_logprob

__all__ = ["token_logprob"]
