"""Self-attention of padded rows and of documents end to end: rotary embedding and SDPA, with Megatron's weights.

The parameters and the inference path are Megatron-Core's; only the arithmetic of a training or scoring forward is ours,
since Megatron's unfused attention materialises the [T, T] scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from megarlhf.models.spec import ModelSpec, RopeScaling
from megarlhf.parallel.context import in_order, whole_sequence
from megarlhf.parallel.cpu import has_flash_attention
from megarlhf.parallel.micro_batches import Documents


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
        """[T, B, H] -> [T, B, H]: causal over right-padded rows, or over each document of a line, [N, 1, H].

        With a KV cache Megatron's own forward runs.
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
        query, key, value = _rotated_qkv(self, hidden_states, rotary_pos_emb)
        core: Any = self.core_attention
        return self.linear_proj(core(query, key, value, packed_seq_params=packed_seq_params))


class EngineSelfAttention(SelfAttention):
    """Megatron's self-attention around Transformer Engine's kernel, with a forward of its own for documents.

    Megatron's cuts the rotary angles by lengths that it reads back from the device, in every layer.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, B, H] -> [T, B, H] as Megatron does it; [N, 1, H] of documents with Transformer Engine's `thd` format."""
        if not isinstance(packed_seq_params, Documents):
            return super().forward(
                hidden_states,
                attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **rest,
            )
        query, key, value = (x[:, 0] for x in _rotated_qkv(self, hidden_states, rotary_pos_emb))
        core: Any = self.core_attention
        context = core(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed_seq_params)
        return self.linear_proj(context.view(len(query), 1, -1))


def _rotated_qkv(layer: SelfAttention, hidden: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if angles is None:
        raise ValueError(f"{type(layer).__name__} needs rotary_pos_emb; build with position_embedding_type='rope'.")
    query, key, value = cast(tuple[Tensor, Tensor, Tensor], layer.get_query_key_value_tensors(hidden, None))
    return rotate(query, angles), rotate(key, angles), value


class CausalAttention(MegatronModule):
    """softmax(q k^T / sqrt(head_dim)) v over right-padded rows: causality alone keeps padding out of every real row.

    Of documents each is attended to by itself: by flash-attn at once where it is installed, else one after another.
    Context ranks gather keys and values, each for its own queries.
    """

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection | None = None, **rest: Any
    ) -> None:
        super().__init__(config=config)
        self.context = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **more: Any,
    ) -> Tensor:
        """Shapes: query [T, B, heads, d]; key, value [T, B, kv_heads, d]. Returns [T, B, heads * d]."""
        if self.context is not None:
            one = (len(query) * self.context.size(),)
            lengths = packed_seq_params.lengths if isinstance(packed_seq_params, Documents) else one
            return _of_context(query, key, value, lengths, self.context).flatten(2)
        if not isinstance(packed_seq_params, Documents):
            return _causal(query, key, value).flatten(2)
        varlen = flash_varlen(query)
        if varlen is not None:
            ends, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            packed = [x[:, 0] for x in (query, key, value)]
            return varlen(*packed, ends, ends, longest, longest, causal=True).flatten(1)[:, None]
        # `split` and not slices: its backward writes each part's gradient once.
        parts = zip(*(x.split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
        return torch.cat([_causal(*part) for part in parts]).flatten(2)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[T, B, heads, d], of as many rows as there are in B; queries of the last T tokens, keys of all."""
    grouped = query.shape[2] != key.shape[2]
    before = len(key) - len(query)
    # torch's own `is_causal` has the first query see the first key alone.
    unseen = _unseen(len(query), before, query.dtype, query.device) if before else None
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, unseen, is_causal=unseen is None, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


@lru_cache(maxsize=4)
def _unseen(queries: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, before + queries]: what is added to scores. One for all layers: backward keeps it, of a bool a copy."""
    return torch.full((queries, before + queries), -math.inf, dtype=dtype, device=device).triu(before + 1)


def _of_context(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup) -> Tensor:
    """Attention of the queries that a context rank has, to whatever is before them.

    Shapes:   query [T / c, B, heads, d], key, value likewise: of each text, one after another, two chunks (see
              `parallel/context.py`); lengths: of the texts, T together. Returns query's shape.
    Ranks:    collective over context.
    Memory:   keys and values of all T, and T / 2 c by T numbers of a mask, once for all layers.
    """
    ranks, rank = group.size(), group.rank()
    sizes = [length // ranks for length in lengths]
    every = whole_sequence(torch.cat([key, value], dim=-1), group).split(sizes, dim=1)
    found: list[Tensor] = []
    for queries, parts in zip(query.split(sizes), every, strict=True):
        keys, values = in_order(parts).chunk(2, dim=-1)
        size = len(queries) // 2
        for chunk, of in zip((rank, 2 * ranks - 1 - rank), queries.split(size), strict=True):
            end = (chunk + 1) * size
            found.append(_causal(of, keys[:end], values[:end]))
    return torch.cat(found)


def flash_varlen(query: Tensor) -> Callable[..., Tensor] | None:
    """flash-attn 2's attention over documents, where it is installed and takes such numbers; it has gradients."""
    module: Any = attention
    if not query.is_cuda or query.dtype == torch.float32 or not has_flash_attention():
        return None
    return cast("Callable[..., Tensor] | None", module.flash_attn_varlen_func)
