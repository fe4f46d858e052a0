"""The numbers of every Llama 3, and of the tiny ladder that runs on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from megarlhf.config import Config
from megarlhf.errors import CheckpointError, ConfigError, LayoutError
from megarlhf.observe.files import read_object
from megarlhf.parallel.layout import ParallelLayout

CONFIG = "config.json"
QUANTISED = ("quantization_config", "compression_config")
"""Keys of config.json, the second of older files, that come with weights in a form of their own."""


class RopeScaling(Config):
    """Llama 3.1's stretched rotary embedding (`rope_type: llama3`)."""

    factor: float = Field(default=8.0, gt=0)
    """Low frequencies are divided by this. Source: 8 in Llama 3.1, 32 in Llama 3.2."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above original_max_positions / this are divided in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below original_max_positions / this are left alone."""
    original_max_positions: int = Field(default=8192, gt=0, le=1 << 26)
    """Context length, in tokens, before stretching."""

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor={self.low_freq_factor} is not below {self.high_freq_factor}, the high")
        return self


class ModelSpec(Config):
    """A Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

    Sizes have bounds, some 50 times those of the largest Llama, so that no file can ask for more than can be looked at.
    """

    vocab_size: int = Field(gt=0, le=1 << 24)
    """Rows of the embedding, special tokens included."""
    hidden_size: int = Field(gt=0, le=1 << 20)
    """Width of the residual stream."""
    layers: int = Field(gt=0, le=10_000)
    """Transformer layers."""
    heads: int = Field(gt=0, le=1 << 14)
    """Query heads."""
    kv_heads: int = Field(gt=0, le=1 << 14)
    """Key and value heads (query groups)."""
    ffn_size: int = Field(gt=0, le=1 << 22)
    """Width of the gated MLP."""
    head_dim: int = Field(gt=0, le=1 << 14)
    """Width of one head; hidden_size / heads in every Llama 3."""
    rope_theta: float = Field(default=500_000.0, gt=0)
    """Base of the rotary frequencies. Source: Llama 3."""
    rope_scaling: RopeScaling | None = None
    """Rotary stretching (Llama 3.1 and later); none in Llama 3."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """The vocabulary projection is the embedding (Llama 3.2 1B and 3B)."""
    max_positions: int = Field(default=8192, gt=1, le=1 << 26)
    """Longest context, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding rotates pairs")
        return self

    @property
    def parameters(self) -> int:
        """Weights of the language model, in numbers (not bytes)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.layers * layer + embeddings + self.hidden_size

    def forward_flops(self, tokens: int, keys: int, projected: int) -> int:
        """Floating-point operations of one forward pass: 2 per multiply-add.

        tokens: positions through the layers; keys: that all of them see together, n (n + 1) / 2 of the first n of a
        text; projected: positions that reach the vocabulary projection.
        """
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        products = 2 * (attention + 3 * self.hidden_size * self.ffn_size) * tokens
        layer = products + 4 * self.heads * self.head_dim * keys
        return self.layers * layer + 2 * projected * self.vocab_size * self.hidden_size

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary rows after padding to a multiple of the tensor ranks; columns from vocab_size on are masked."""
        return -(-self.vocab_size // tensor) * tensor

    def check_layout(self, layout: ParallelLayout, name: str = "model") -> None:
        """Raise LayoutError where the layout does not divide this model."""
        layout.check_divides(f"{name} heads", self.heads, "tensor", layout.tensor)
        layout.check_divides(f"{name} query groups", self.kv_heads, "tensor", layout.tensor)
        layout.check_divides(f"{name} ffn_size", self.ffn_size, "tensor", layout.tensor)
        if not self.counts_ends(layout.stages):
            axis = "pipeline" if layout.virtual_pipeline == 1 else "pipeline x virtual_pipeline"
            layout.check_divides(f"{name} layers", self.layers, axis, layout.stages)

    def counts_ends(self, stages: int) -> bool:
        """Whether embedding and head count as a layer each when layers are dealt out: only then do stages divide them.

        Llama 3.1 405B has 126 layers for the sake of this: 16 stages of 8, the first and the last with 7 of its layers.
        """
        return self.layers % stages != 0 and (self.layers + 2) % stages == 0 and self.layers + 2 >= 2 * stages

    def layers_of(self, stages: int, *, first: bool, last: bool) -> int:
        """Layers of one of `stages` equal pieces, the `first` or the `last` or one between."""
        if self.counts_ends(stages):
            return (self.layers + 2) // stages - first - last
        return self.layers // stages

    def check_fp8(self, layout: ParallelLayout, multiple: int) -> None:
        """Raise LayoutError where a rank's part of a matrix has sides that are not multiples, as FP8 products want."""
        for name, size in (
            ("hidden_size", self.hidden_size),
            ("heads * head_dim / layout.tensor", self.heads * self.head_dim // layout.tensor),
            ("kv_heads * head_dim / layout.tensor", self.kv_heads * self.head_dim // layout.tensor),
            ("ffn_size / layout.tensor", self.ffn_size // layout.tensor),
        ):
            if size % multiple:
                raise LayoutError(
                    f"compute.fp8 needs sides that are multiples of {multiple}, but {name}={size}; set "
                    "compute.fp8=off, or choose another layout.tensor."
                )

    @classmethod
    def from_hf(cls, directory: Path) -> ModelSpec:
        """The spec in a Hugging Face directory's `config.json`.

        Raises:   CheckpointError when the file is missing, is not JSON, or is not a Llama 3.
        """
        return cls.from_hf_config(read_config(directory), directory / CONFIG)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any], path: Path) -> ModelSpec:
        """The spec in what `path`, a `config.json`, holds. Raises CheckpointError when it is not a Llama 3."""
        quantised = next((key for key in QUANTISED if config.get(key) is not None), None)
        if quantised:
            raise CheckpointError(
                f"{path}: {quantised} says that the weights are quantised; weights of 16 or 32 bits are read, name the "
                "model that these were made from, or store them dequantised and without this setting."
            )
        try:
            return _from_hf_config(config)
        except ValidationError as error:
            first = error.errors()[0]
            cause = f"{'.'.join(map(str, first['loc'])) or 'its numbers'}: {first['msg']}"
        except KeyError as error:
            cause = f"{error} is missing"
        except (TypeError, ValueError, ArithmeticError) as error:
            cause = str(error)
        raise CheckpointError(f"{path}: not a Llama 3 configuration ({cause}); name a Llama 3 model.")


def read_config(directory: Path) -> dict[str, Any]:
    """What the `config.json` of a Hugging Face directory holds. Raises CheckpointError where it is no JSON object."""
    try:
        return read_object(directory / CONFIG)
    except FileNotFoundError:
        raise CheckpointError(f"model directory {directory}: {CONFIG} is missing; name a complete one.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: not JSON ({error}); download the model again.") from None


def _from_hf_config(config: dict) -> ModelSpec:
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type={config.get('model_type')!r}, expected 'llama'")
    for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, expected) != expected:
            raise ValueError(f"{key}={config[key]!r}, expected {expected!r}")
    # transformers 5 writes `rope_parameters`; earlier releases wrote `rope_theta` and `rope_scaling`.
    rope, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if rope is None:
        rope = {"rope_theta": config.get("rope_theta"), **({} if scaling is None else scaling)}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r}, expected a mapping")
    _check_rope(rope, config)
    heads = config["num_attention_heads"]
    fields = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"],
        "ffn_size": config["intermediate_size"],
        "head_dim": config["hidden_size"] // heads if config.get("head_dim") is None else config["head_dim"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _rope_scaling(rope),
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "max_positions": config["max_position_embeddings"],
    }
    # Strict: a true or a "4" in place of a number is damage.
    return ModelSpec.model_validate(fields, strict=True)


def _check_rope(rope: dict, config: dict) -> None:
    """Raise ValueError where older spellings beside `rope` say something else: readers differ in whom they believe."""
    scaling = config.get("rope_scaling")
    older = {**(scaling if isinstance(scaling, dict) else {}), "rope_theta": config.get("rope_theta")}
    for key, value in older.items():
        said = rope.get("rope_type", rope.get("type")) if key in ("type", "rope_type") else rope.get(key)
        if value is not None and value != said:
            raise ValueError(f"{key}={value!r} and {said!r} contradict each other; leave the right one")
    for place in (rope, config):
        if place.get("partial_rotary_factor", 1) not in (1, None):
            raise ValueError(f"partial_rotary_factor={place['partial_rotary_factor']!r}, expected 1")


def _rope_scaling(rope: dict) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r}, expected 'llama3' or 'default'")
    fields = {
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_positions": rope["original_max_position_embeddings"],
    }
    return RopeScaling.model_validate(fields, strict=True)


def _llama(hidden_size: int, layers: int, heads: int, kv_heads: int, ffn_size: int, **rest: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "vocab_size": 128_256,
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "ffn_size": ffn_size,
            "head_dim": hidden_size // heads,
            **rest,
        }
    )


LONG = {"rope_scaling": RopeScaling(), "max_positions": 131_072}
SMALL = {"rope_scaling": RopeScaling(factor=32.0), "max_positions": 131_072, "tie_embeddings": True}
TINY = {"vocab_size": 160, "max_positions": 256, "rope_theta": 10_000.0}

PRESETS: dict[str, ModelSpec] = {
    "llama3-8b": _llama(4096, 32, 32, 8, 14_336),
    "llama3-70b": _llama(8192, 80, 64, 8, 28_672),
    "llama3.1-8b": _llama(4096, 32, 32, 8, 14_336, **LONG),
    "llama3.1-70b": _llama(8192, 80, 64, 8, 28_672, **LONG),
    "llama3.1-405b": _llama(16_384, 126, 128, 8, 53_248, **LONG),
    "llama3.2-1b": _llama(2048, 16, 32, 8, 8192, **SMALL),
    "llama3.2-3b": _llama(3072, 28, 24, 8, 8192, **SMALL),
    "llama3.3-70b": _llama(8192, 80, 64, 8, 28_672, **LONG),
    # The ladder of the laptop studies: about 0.2, 1, 4 and 19 million parameters.
    "tiny-xs": _llama(64, 4, 4, 2, 192, **TINY),
    "tiny-s": _llama(128, 4, 4, 2, 512, **TINY),
    "tiny-m": _llama(256, 4, 8, 4, 1024, **TINY),
    "tiny-l": _llama(512, 6, 8, 4, 1536, **TINY),
}
"""Source: the `config.json` of each meta-llama release."""


def preset(name: str) -> ModelSpec:
    """The spec called `name`. Raises ConfigError listing the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
