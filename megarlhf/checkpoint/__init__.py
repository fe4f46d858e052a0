"""Saving, resuming, and reading Hugging Face directories."""
