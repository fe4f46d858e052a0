"""The `config.json` of a model directory: as it came from Hugging Face, or written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarlhf.checkpoint.hf_extras import bare
from megarlhf.checkpoint.hf_names import OURS, Normalisation
from megarlhf.checkpoint.model_directory import TOLD, ModelDescription
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.errors import CheckpointError
from megarlhf.models.spec import ModelSpec, read_config

ARCHITECTURES = {"language": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"}


def hf_config(described: ModelDescription, dtype: str, original: Path, tokenizer: Path) -> dict[str, Any]:
    """What `config.json` must say.

    original: the model's first config.json, kept where there is one: it knows more than a ModelSpec. tokenizer: its
    directory, whose token ids a new config.json takes.
    Raises:   CheckpointError when the original describes another model.
    """
    config = _kept(original, described.spec) if original.is_file() else _new(described, tokenizer)
    if described.head == "scalar" and config.get("pad_token_id") is None:
        config |= _ids(described, tokenizer, "pad_token_id")  # transformers finds the end of a row by it
    config |= {"architectures": [ARCHITECTURES[described.head]], "dtype": dtype, "torch_dtype": dtype}
    if described.head == "scalar":
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config.pop(OURS, None)
    scores = Normalisation(described.score_offset, described.score_scale, described.score_wrong)
    told = described.model_dump(mode="json", include=set(TOLD), exclude_defaults=True)
    if told or scores != Normalisation():
        config[OURS] = {**scores._asdict(), **told}
    return config


def _kept(original: Path, spec: ModelSpec) -> dict[str, Any]:
    found = ModelSpec.from_hf(original.parent)
    if found != spec:
        fields = [name for name in ModelSpec.model_fields if vars(found)[name] != vars(spec)[name]]
        raise CheckpointError(
            f"{original}: differs from model.json in {', '.join(fields)}; remove it, and one is made from model.json."
        )
    config = read_config(original.parent)
    config.pop("auto_map", None)  # names Python files to be run
    return config


def _new(described: ModelDescription, tokenizer: Path) -> dict[str, Any]:
    spec = described.spec
    # The form of Meta's own files, which transformers 4 and 5 and other engines read alike.
    scaling = spec.rope_scaling
    rope = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        # transformers' own defaults are ids of Llama 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return config | _ids(described, tokenizer, "bos_token_id", "eos_token_id", "pad_token_id")


def _ids(described: ModelDescription, tokenizer: Path, *names: str) -> dict[str, Any]:
    """Those entries, by the tokenizer where there is one."""
    if not (tokenizer / "tokenizer.json").is_file():
        return {}
    known = load_tokenizer(tokenizer)
    ends = known.of_model(described.eos_ids, None).eos_ids
    ids = {"bos_token_id": [known.bos_id], "eos_token_id": ends, "pad_token_id": [known.pad_id]}
    # transformers refuses to build an embedding without a row for its padding.
    fitting = {name: [i for i in ids[name] if i is not None and i < described.spec.vocab_size] for name in names}
    return {name: bare(each) for name, each in fitting.items() if each}
