"""Low-rank adapters on the matrices of a model whose own weights stay as they are.

    y = W x + alpha / rank * B A x        A [rank, in], drawn at random     B [out, rank], 0 at the start

Megatron cuts W over tensor ranks by its outputs (qkv, fc1) or by its inputs (proj, fc2). An adapter is cut as its W is:
B by outputs with A whole on each rank, or A by inputs with B whole. What is whole sees equal numbers on every rank, or
under sequence parallelism each rank's slice of the tokens: then its gradient is summed, as that of a norm is.

Source: Hu et al. 2021, arXiv 2106.09685. No dropout, as there is none anywhere here: a run draws nothing in its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import linear

from megarlhf.config import Config
from megarlhf.errors import ConfigError
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.rng import generator

Target = Literal["qkv", "proj", "fc1", "fc2"]
MODULES: dict[Target, str] = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""Where each matrix is in a layer."""
BY_INPUT: frozenset[Target] = frozenset({"proj", "fc2"})
"""Matrices of which a tensor rank has columns; of the others it has rows."""


class LoraConfig(Config):
    """Low-rank adapters: they learn, and the model's own weights stay as they are."""

    rank: int = Field(default=32, ge=1)
    """Inner width of each adapter. Source: 32 is Megatron-Bridge's default."""
    alpha: float = Field(default=32.0, gt=0)
    """What an adapter adds is multiplied by alpha / rank. Source: 32 in Schulman et al. 2025 (LoRA Without Regret), who
    find learning rates ten times those of full training best."""
    targets: tuple[Target, ...] = ("qkv", "proj", "fc1", "fc2")
    """Matrices with an adapter: qkv (queries, keys and values share A) and proj of attention, fc1 (gate and up share A)
    and fc2 of the MLP. Source: all of them, Schulman et al. 2025."""

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if not targets or len(set(targets)) < len(targets):
            raise ValueError(f"name each of {', '.join(MODULES)} at most once, and at least one")
        return targets

    @property
    def scale(self) -> float:
        """Of what an adapter adds."""
        return self.alpha / self.rank

    def check(self, spec: ModelSpec, name: str) -> None:
        """Raise ConfigError where a matrix has a side shorter than the rank; `name` is the setting."""
        for target in self.targets:
            side = min(sides(target, spec))
            if self.rank > side:
                raise ConfigError(
                    f"{name}.rank={self.rank} is more than {side}, the shorter side of {target}, and no more than "
                    f"that can differ; set {name}.rank to at most {side}, or leave {target} out of {name}.targets."
                )


def sides(target: Target, spec: ModelSpec) -> tuple[int, int]:
    """Outputs and inputs of the whole matrix."""
    hidden, width = spec.hidden_size, spec.head_dim
    return {
        "qkv": ((spec.heads + 2 * spec.kv_heads) * width, hidden),
        "proj": (hidden, spec.heads * width),
        "fc1": (2 * spec.ffn_size, hidden),
        "fc2": (hidden, spec.ffn_size),
    }[target]


def sizes(lora: LoraConfig, spec: ModelSpec, tensor: int) -> list[int]:
    """Numbers in each tensor of one layer's adapters on one of `tensor` ranks."""
    found: list[int] = []
    for target in lora.targets:
        out, into = sides(target, spec)
        cut = target in BY_INPUT
        found += [lora.rank * into // (tensor if cut else 1), lora.rank * out // (1 if cut else tensor)]
    return found


class Adapter(torch.nn.Module):
    """alpha / rank * B A x beside one of Megatron's tensor-parallel linear layers, whoever wrote that.

    Shapes:   a [rank, this rank's inputs], b [this rank's outputs, rank], in the layer's dtype.
    """

    def __init__(self, layer: Any, target: Target, lora: LoraConfig, group: Any) -> None:
        super().__init__()
        self.target: Target = target
        self.scale = lora.scale
        self.on = True
        """Off, the layer is what it was without."""
        self._group = group
        self._by_input = target in BY_INPUT
        self._split = bool(layer.sequence_parallel)
        outputs, inputs = layer.weight.shape
        self.a = torch.nn.Parameter(layer.weight.new_empty(lora.rank, inputs))
        self.b = torch.nn.Parameter(layer.weight.new_zeros(outputs, lora.rank))
        # Without the mark a tensor passes for a copy, and the gradient norm would count tensor rank 0's part alone.
        cut: Any = self.a if self._by_input else self.b
        cut.tensor_model_parallel, cut.partition_dim = True, int(self._by_input)
        cut.partition_stride = 2 if target == "fc1" else 1
        whole: Any = self.b if self._by_input else self.a
        whole.sequence_parallel = self._split
        self._hook = layer.register_forward_hook(_add)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """What the layer made of x, `out`, with what the adapter adds.

        Shapes:   x [s, b, this rank's inputs] and out [s, b, this rank's outputs], as the layer takes and gives them:
                  under sequence parallelism the side that is whole has this rank's slice of s.
        Ranks:    tensor: one exchange of `rank` numbers a token.
        """
        low = linear(x, self.a)
        if self._by_input:
            reduce = (
                reduce_scatter_to_sequence_parallel_region if self._split else reduce_from_tensor_model_parallel_region
            )
            low = reduce(low, group=self._group)
        elif self._split:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self._group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self._group)
        # One call, whose rounding leaves `out` as it is where b is 0.
        added = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.b.t(), alpha=self.scale)
        return added.view_as(out)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """[this rank's outputs, this rank's inputs]: W + alpha / rank * B A, summed in fp32 and rounded once."""
        return (weight.float() + self.scale * (self.b.float() @ self.a.float())).to(weight.dtype)

    def remove(self, layer: Any) -> None:
        """Leave `layer`, whose adapter this is, as it was without."""
        self._hook.remove()
        del layer.lora


class Adapted(NamedTuple):
    """A layer with its adapter."""

    chunk: int
    """Of this rank's."""
    name: str
    """Of the layer, in its chunk."""
    number: int
    """Of the transformer layer that it is in, from 0 over the whole model."""
    layer: Any
    adapter: Adapter


def attach(chunks: Sequence[Any], lora: LoraConfig) -> None:
    """Give the matrices that `lora` names an adapter each, whose A is not set yet and whose B is 0."""
    for chunk in chunks:
        for block in chunk.decoder.layers:
            for target in lora.targets:
                layer = block.get_submodule(MODULES[target])
                layer.add_module("lora", Adapter(layer, target, lora, chunk.pg_collection.tp))


def _add(layer: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """A forward hook: of a layer that takes its tensor by position, and gives it with a bias to be added later."""
    return (layer.lora(inputs[0], output[0]), output[1]) if layer.lora.on else output


def adapted(chunks: Iterable[Any]) -> Iterator[Adapted]:
    """Every adapter of this rank."""
    for index, chunk in enumerate(chunks):
        for place, block in enumerate(chunk.decoder.layers):
            for module in MODULES.values():
                layer = block.get_submodule(module)
                if "lora" in dict(layer.named_children()):
                    name = f"decoder.layers.{place}.{module}"
                    yield Adapted(index, name, block.layer_number - 1, layer, layer.lora)


@torch.no_grad()
def draw(chunks: Iterable[Any], spec: ModelSpec, seed: Sequence[int | str], part: int, parts: int) -> None:
    """Set every A: uniform between -1 / sqrt(in) and that, each whole A from its own seed, so alike in every layout.

    part, parts: which of how many tensor ranks this is.
    Source:   the bounds are those of Hu et al.'s code and of PEFT (Kaiming uniform with a = sqrt(5)).
    """
    for each in adapted(chunks):
        adapter = each.adapter
        inputs = sides(adapter.target, spec)[1]
        random = torch.rand(len(adapter.a), inputs, generator=generator(*seed, "lora", adapter.target, each.number))
        whole = (2 * random - 1) / math.sqrt(inputs)
        adapter.a.copy_(whole.chunk(parts, dim=1)[part] if adapter.target in BY_INPUT else whole)


@torch.no_grad()
def merge(chunks: Iterable[Any]) -> None:
    """Add every adapter to its matrix, and remove it."""
    for each in adapted(chunks):
        each.layer.weight.copy_(each.adapter.merged(each.layer.weight))
        each.adapter.remove(each.layer)


@contextmanager
def adapters_off(chunks: Iterable[Any]) -> Iterator[None]:
    """Inside, the model is what it was before it had adapters."""
    found = [each.adapter for each in adapted(chunks)]
    for adapter in found:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.on = True
