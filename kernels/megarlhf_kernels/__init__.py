"""Kernels of megarlhf: torch and triton only, usable without the rest of the library."""
