"""RLHF for Llama 3 on Megatron-Core: one code path for a laptop CPU and for GPU clusters."""

__version__ = "0.1.0"
