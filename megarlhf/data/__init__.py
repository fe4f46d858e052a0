"""From text to token batches: tokenizers, prompts, preferences, SFT rows, the loader and the built-in tasks."""
