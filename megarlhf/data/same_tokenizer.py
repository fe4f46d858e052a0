"""Whether two tokenizers make the same ids of the same text: their backends' JSON, less what does not matter for it."""

from __future__ import annotations

from typing import Any

_PARTS = ("normalizer", "pre_tokenizer", "model")
"""What decides ids, beside `added_tokens`; decoder, post-processor, padding and truncation are not used for that here.
"""
_COSMETIC = {"trim_offsets", "special"}


def encoding_of(backend: dict[str, Any]) -> dict[str, Any]:
    """What decides ids in the JSON of a `tokenizers.Tokenizer`, the vocabulary and added tokens by id."""
    model = dict(backend["model"])
    vocabulary = model.pop("vocab", {})
    # A unigram model has a list of (token, score).
    by_id = {number: token for token, number in vocabulary.items()} if isinstance(vocabulary, dict) else vocabulary
    parts = {name: backend.get(name) for name in _PARTS} | {"model": model}
    added = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in backend.get("added_tokens", [])}
    return {"vocabulary, id": by_id, "added token": added, **parts}


def first_difference(ours: Any, theirs: Any, place: str = "") -> str:
    """Where two such descriptions differ first, in words; empty where they do not."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [key for key in _ordered(ours, theirs) if key not in _COSMETIC]
        pairs = ((f"{place} {key}".strip(), ours.get(key), theirs.get(key)) for key in keys)
    elif isinstance(ours, list) and isinstance(theirs, list):
        both = ((ours[i : i + 1], theirs[i : i + 1]) for i in range(max(len(ours), len(theirs))))
        pairs = ((f"{place} {i}", next(iter(a), None), next(iter(b), None)) for i, (a, b) in enumerate(both))
    else:
        return "" if ours == theirs else f"{place} is {_shown(ours)} in the first and {_shown(theirs)} in the second"
    return next((said for name, a, b in pairs if a != b and (said := first_difference(a, b, name))), "")


def _ordered(ours: dict[Any, Any], theirs: dict[Any, Any]) -> list[Any]:
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return sorted(keys) if all(isinstance(key, int) for key in keys) else keys


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
