"""The `config.json` of a model directory: as it came from Hugging Face, or written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarlhf.checkpoint.hf_names import OURS, Normalisation
from megarlhf.checkpoint.sharded import ModelDescription
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
    config = _kept(original, described.spec) if original.is_file() else _new(described.spec, tokenizer)
    config |= {"architectures": [ARCHITECTURES[described.head]], "dtype": dtype, "torch_dtype": dtype}
    if described.head == "scalar":
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config.pop(OURS, None)
    scores = Normalisation(described.score_offset, described.score_scale, described.score_wrong)
    if scores != Normalisation():
        config[OURS] = scores._asdict()
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


def _new(spec: ModelSpec, tokenizer: Path) -> dict[str, Any]:
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
    if (tokenizer / "tokenizer.json").is_file():
        known = load_tokenizer(tokenizer)
        ids = {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id, "pad_token_id": known.pad_id}
        # transformers refuses to build an embedding without a row for its padding.
        config |= {name: number for name, number in ids.items() if number is not None and number < spec.vocab_size}
    return config
