"""Llama 3 on Megatron-Core: specs, transformer, heads, optimiser, and the roles that algorithms work with."""
