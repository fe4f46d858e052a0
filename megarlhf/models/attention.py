"""Self-attention for machines without Transformer Engine: rotary embedding and SDPA, with Megatron's weights.

The parameters and the inference path are Megatron-Core's; only the arithmetic of a training or scoring forward is ours,
since Megatron's unfused attention materialises the [T, T] scores.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megarlhf.models.spec import ModelSpec, RopeScaling


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Rotary angle per position of each pair of channels, stretched as the spec says.

    Shapes:   returns [head_dim / 2] fp32.
    Units:    radians per token.
    Source:   Su et al. 2021; the stretching is Llama 3.1's.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    return frequencies if spec.rope_scaling is None else _stretch(frequencies, spec.rope_scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 at the longest wavelengths (divided in full), 1 at the shortest (left alone), linear between.
    kept = ((scaling.original_max_positions / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


class _Rotate(torch.autograd.Function):
    """Rotate pairs of channels by an angle; the gradient rotates back. Four half-width passes instead of six full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Apply rotary position embedding, in fp32, to the halves layout that Hugging Face and Megatron share.

    Shapes:   x [T, B, heads, head_dim]; angles [T, 1, 1, head_dim], its two halves equal. Returns x's shape and dtype.
    Units:    angles in radians.
    """
    half = angles[..., : angles.shape[-1] // 2].float()
    rotated: Any = _Rotate.apply(x, half.cos().to(x.dtype), half.sin().to(x.dtype))
    return rotated


class LocalSelfAttention(SelfAttention):
    """Megatron's self-attention with a lean forward where no KV cache is involved."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        key_value_states: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, B, H] -> [T, B, H]: causal over right-padded rows. With a KV cache Megatron's own forward runs.

        Raises:   ValueError for packed rows, which would see each other.
        """
        if inference_context is not None:
            return super().forward(
                hidden_states,
                attention_mask,
                key_value_states=key_value_states,
                inference_context=inference_context,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **rest,
            )
        if packed_seq_params is not None:
            raise ValueError("LocalSelfAttention reads one row after another; give it padded rows, not packed ones.")
        if rotary_pos_emb is None:
            raise ValueError(
                "LocalSelfAttention needs rotary_pos_emb; build the model with position_embedding_type='rope'."
            )
        query, key, value = cast(tuple[Tensor, Tensor, Tensor], self.get_query_key_value_tensors(hidden_states, None))
        core: Any = self.core_attention
        context = core(rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb), value)
        return self.linear_proj(context)


class CausalAttention(MegatronModule):
    """softmax(q k^T / sqrt(head_dim)) v over right-padded rows: causality alone keeps padding out of every real row."""

    def __init__(self, config: TransformerConfig, **rest: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Shapes: query [T, B, heads, d]; key, value [T, B, kv_heads, d]. Returns [T, B, heads * d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)
