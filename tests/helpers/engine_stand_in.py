"""Stands in for the package transformer_engine where there is no GPU: what Megatron-Core imports of it, in plain torch.

It keeps what our code must reckon with: FP8 copies of weights live on from one forward to the next and are made anew
only when the caller says that a first micro-batch has come; FP8 products refuse sizes that tensor cores cannot take;
FusedAdam keeps two moments a weight and counts steps in its groups. Products are of numbers rounded to FP8 and back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.optimizers_stand_in import (
    FusedAdam,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)

VERSION = "2.11.0"
LARGEST = 448.0
"""Of torch.float8_e4m3fn."""


class State:
    """transformer_engine.pytorch.fp8.FP8GlobalStateManager."""

    enabled = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls) -> None:
        return None

    @classmethod
    def set_skip_fp8_weight_update_tensor(cls, skip: bool) -> None:
        """A captured graph reads it."""


@contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    before, State.enabled = State.enabled, enabled
    try:
        yield
    finally:
        State.enabled = before


class Recipe:
    """Any of transformer_engine.common.recipe: how scales are found. This stand-in takes the tensor's own largest."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class DelayedScaling(Recipe):
    """A recipe whose scales are state: those of past forwards."""


class QuantizedTensor:
    """Numbers in eight bits and the factor that brings them back."""

    def __init__(self, numbers: Tensor) -> None:
        largest = numbers.detach().abs().max().float().clamp(min=1e-12)
        self.scale = LARGEST / largest
        self.data = (numbers.detach().float() * self.scale).to(torch.float8_e4m3fn)

    def dequantize(self) -> Tensor:
        return self.data.float() / self.scale


class Module(torch.nn.Module):
    """transformer_engine.pytorch.module.base.TransformerEngineBaseModule."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self._fp8_workspaces: dict[str, QuantizedTensor] = {}

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to keep."""

    def quantized_weight(self, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        """The cached copy, made anew when asked for or missing; gradients pass through to the weight."""
        copy = self._fp8_workspaces.get("weight")
        if copy is None or is_first_microbatch is None or is_first_microbatch:
            copy = QuantizedTensor(weight)
            if is_first_microbatch is not None:
                self._fp8_workspaces["weight"] = copy
        return _through(weight, copy)


def _through(numbers: Tensor, copy: QuantizedTensor) -> Tensor:
    return numbers + (copy.dequantize() - numbers).detach().to(numbers.dtype)


def check_sizes(rows: Tensor, weight: Tensor) -> None:
    count = rows[..., 0].numel()
    for tensor, first in ((rows, count), (weight, weight.shape[0])):
        if first % 8 or tensor.shape[-1] % 16:
            raise AssertionError(f"FP8 wants rows % 8 == 0 and columns % 16 == 0, but got dims={list(tensor.size())}")
    if torch.is_grad_enabled() and count % 16:
        raise AssertionError(f"the weight's gradient sums over {count} rows, not a multiple of 16")


class Linear(Module):
    """transformer_engine.pytorch.Linear without bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        **rest: Any,
    ) -> None:
        super().__init__()
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.tp_group, self.parallel_mode, self.sequence_parallel = tp_group, parallel_mode, sequence_parallel
        self.save_original_input = False
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
        split: Any = self.weight
        split.tensor_model_parallel = parallel_mode is not None
        split.partition_dim, split.partition_stride = (0 if parallel_mode == "column" else 1), 1

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        # As in TE: what this rank itself brings must fit, before anything is gathered.
        weight = self.weight
        if State.enabled:
            check_sizes(inp, weight)
        if self.parallel_mode == "column":
            enter = (
                mappings.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region
            )
            inp = enter(inp, group=self.tp_group)
        if State.enabled:
            weight = self.quantized_weight(weight, is_first_microbatch)
            inp = _through(inp, QuantizedTensor(inp))
        out = torch.nn.functional.linear(inp, weight)
        if self.parallel_mode == "row":
            leave = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
            out = leave(out, group=self.tp_group)
        return out


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        hidden_size: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        width = normalized_shape or hidden_size  # by the older name in Megatron-Core 0.16
        assert width is not None
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=params_dtype))
        marked: Any = self.weight
        marked.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DotProductAttention(torch.nn.Module):
    """Of c context ranks each has chunk r and chunk 2 c - 1 - r of a text. TE passes keys and values round a ring."""

    def __init__(self, *sizes: Any, cp_group: Any = None, cp_comm_type: str = "p2p", **rest: Any) -> None:
        super().__init__()
        assert cp_comm_type == "p2p"
        assert cp_group is None or (rest["cp_stream"] is not None and len(rest["cp_global_ranks"]) == cp_group.size())
        self.context = cp_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        attn_mask_type: str,
        qkv_format: str = "sbhd",
        **packed: Any,
    ) -> Tensor:
        """[s, b, heads, d] -> [s, b, heads * d]; in the format `thd` [t, heads, d] -> [t, heads * d]."""
        ranks = self.context.size() if self.context is not None else 1
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal"
            assert query.ndim == 3
            ends = self._ends(packed, len(query) * ranks)
            return self._attended(query[:, None], key[:, None], value[:, None], ends, ranks)[:, 0]
        assert attn_mask_type == "causal"
        return self._attended(query, key, value, torch.tensor([0, len(query) * ranks]), ranks)

    def _ends(self, packed: dict[str, Any], tokens: int) -> Tensor:
        given = {name: value for name, value in packed.items() if value is not None}
        assert given.keys() == {"cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
        ends, lengths = given["cu_seqlens_q"], given["cu_seqlens_q"].diff()
        assert ends.dtype == torch.int32
        assert torch.equal(ends, given["cu_seqlens_kv"])
        assert tokens == int(ends[-1])
        assert given["max_seqlen_q"] == given["max_seqlen_kv"] == int(lengths.max())
        return ends

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, ranks: int) -> Tensor:
        """Each token to those of its own text that are not behind it; ends: of the texts, over all ranks."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as gathered

        if ranks > 1:
            key, value = (gathered(x, tensor_parallel_output_grad=True, group=self.context) for x in (key, value))
        text = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())
        there = torch.cat([_tokens_of(ends, rank, ranks) for rank in range(ranks)])
        here = _tokens_of(ends, self.context.rank() if self.context is not None else 0, ranks)
        seen = (text[here][:, None] == text[there]) & (there <= here[:, None])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def _tokens_of(ends: Tensor, rank: int, ranks: int) -> Tensor:
    """Which tokens a context rank has."""
    if ranks == 1:
        return torch.arange(int(ends[-1]))
    assert not (ends % (2 * ranks)).any(), "TE wants every text to be a multiple of 2 x context"
    chunks = [torch.arange(a, b).chunk(2 * ranks) for a, b in pairwise(ends.tolist())]
    return torch.cat([text[place] for text in chunks for place in (rank, 2 * ranks - 1 - rank)])


def checkpoint(function: Callable[..., Any], *args: Any, **rest: Any) -> Any:
    """Activations are computed again in backward, in FP8 where they were so at first, as Transformer Engine does it."""
    from torch.utils.checkpoint import checkpoint as recomputed

    enabled = State.enabled

    def as_at_first(*given: Any) -> Any:
        with fp8_autocast(enabled):
            return function(*given)

    return recomputed(as_at_first, *args, use_reentrant=True)


class Unused(torch.nn.Module):
    """A class that Megatron derives from and this project has no use for."""


def install() -> None:
    """Put the modules in place; before Megatron-Core is imported, in a process of its own."""
    assert "megatron.core" not in sys.modules, "Megatron-Core has looked for transformer_engine already"
    recipe = _module(
        "transformer_engine.common.recipe",
        Format=SimpleNamespace(E4M3="e4m3", HYBRID="hybrid"),
        Recipe=Recipe,
        DelayedScaling=DelayedScaling,
        Float8CurrentScaling=type("Float8CurrentScaling", (Recipe,), {}),
        Float8BlockScaling=type("Float8BlockScaling", (Recipe,), {}),
    )
    common = _module("transformer_engine.common", recipe=recipe)
    fp8 = _module(
        "transformer_engine.pytorch.fp8",
        FP8GlobalStateManager=State,
        fp8_autocast=fp8_autocast,
        fp8_model_init=None,
    )
    base = _module(
        "transformer_engine.pytorch.module.base", TransformerEngineBaseModule=Module, get_dummy_wgrad=torch.empty
    )
    distributed = _module(
        "transformer_engine.pytorch.distributed",
        CudaRNGStatesTracker=type("CudaRNGStatesTracker", (), {}),
        checkpoint=checkpoint,
        activation_recompute_forward=None,
        is_fp8_activation_recompute_enabled=lambda: False,
    )
    pytorch = _module(
        "transformer_engine.pytorch",
        Linear=Linear,
        RMSNorm=RMSNorm,
        DotProductAttention=DotProductAttention,
        LayerNormLinear=Unused,
        GroupedLinear=Unused,
        fp8_autocast=fp8_autocast,
        fp8=fp8,
        distributed=distributed,
        module=_module("transformer_engine.pytorch.module", base=base),
        ops=_module("transformer_engine.pytorch.ops", Sequential=Unused, FusibleOperation=Unused),
        tensor=_module("transformer_engine.pytorch.tensor", QuantizedTensor=QuantizedTensor),
    )
    names = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    _module("transformer_engine.pytorch.router", **dict.fromkeys(names))
    _module(
        "transformer_engine.pytorch.optimizers",
        FusedAdam=FusedAdam,
        FusedSGD=torch.optim.SGD,
        multi_tensor_applier=multi_tensor_applier,
        multi_tensor_l2norm=multi_tensor_l2norm,
        multi_tensor_scale=multi_tensor_scale,
        multi_tensor_scale_tensor=multi_tensor_scale,
    )
    _module("transformer_engine", __version__=VERSION, common=common, pytorch=pytorch)


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    sys.modules[name] = module
    return module
