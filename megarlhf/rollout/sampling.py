"""Draw tokens so that a rollout depends on its prompt, its index and the seed, and on nothing else in the batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from megarlhf.config import Config
from megarlhf.errors import ConfigError, LayoutError
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout


class SamplingConfig(Config):
    """How responses are drawn."""

    temperature: float = Field(default=0.7, ge=0.0)
    """Divides the logits before the softmax; 0 always takes the most likely token. Source: 0.7 in Huang et al. 2024."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k most likely tokens (more when the k-th is tied); 0 draws from all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest most likely tokens that hold this much probability; 1 draws from all."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest response, in tokens, EOS included; one that has not ended by then is cut."""


class RolloutLayout(Config):
    """Tensor x data parallelism of rollouts, over the ranks of `layout`."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix while responses are drawn; divides heads, query groups and FFN size."""
    data: int = Field(default=1, ge=1)
    """Copies of the model that draw, each its own responses."""


class RolloutConfig(Config):
    """How much is drawn at once, and where. Changes no response but by rounding."""

    layout: RolloutLayout | None = None
    """Draw in another layout, without pipeline stages: the weights are copied there before each rollout, checked by
    checksum, and take their share of memory until it ends. null: in the layout of training."""

    rows: int = Field(default=512, ge=1)
    """Responses decoded at once on one data rank; on a GPU no more than its memory holds. Others wait their turn."""
    memory_share: float = Field(default=0.8, gt=0, lt=1)
    """Share of a GPU's free memory that the KV cache may take; the rest is for the activations of prefills."""
    prefill_tokens: int = Field(default=16_384, ge=1)
    """Prompt tokens that may enter one step; bounds the memory of its activations. Source: Megatron-Core's default."""
    graphs: int = Field(default=8, ge=1)
    """Batch sizes, evenly spaced, for which decoding is captured where `compute.cuda_graphs` says so. Megatron-LM takes
    16, and captures them once a run."""
    keep: bool = False
    """Keep the KV cache, and on a GPU the CUDA graphs, from rollout to rollout. Needs weights that stay where they are
    (`offload=none`), and memory: all else has what memory_share leaves."""


USUAL = RolloutConfig()
"""Where nobody says otherwise."""


def elsewhere(layout: ParallelLayout, rollout: RolloutConfig) -> ParallelLayout | None:
    """The layout that rollouts are drawn in; None where it is that of training, `layout`."""
    if rollout.layout is None:
        return None
    axes = rollout.layout
    other = ParallelLayout(tensor=axes.tensor, data=axes.data, elastic=layout.elastic)
    return None if other == layout.drawing else other


def check_rolls_out(layout: ParallelLayout, rollout: RolloutConfig, *, offload: str, fp8: bool) -> None:
    """Raise LayoutError where no rollout can be drawn on `layout`, ConfigError where a cache cannot be kept."""
    other = elsewhere(layout, rollout)
    if other is not None and other.world_size != layout.world_size:
        raise LayoutError(
            f"rollout.layout is of {other.world_size} ranks (tensor {other.tensor} x data {other.data}) but layout is "
            f"of {layout.world_size}, which both train and draw; set {_nearest(layout, other.tensor)}."
        )
    if other is None and layout.virtual_pipeline > 1:
        raise LayoutError(
            f"layout.virtual_pipeline={layout.virtual_pipeline} cannot roll out: Megatron-Core's inference engine "
            f"wants one model chunk a rank; set layout.virtual_pipeline=1, or draw elsewhere: "
            f"{_nearest(layout, layout.tensor)}."
        )
    if rollout.keep and offload != "none":
        raise ConfigError(
            f"rollout.keep=true with offload={offload}: the weights move, and graphs of where they were would be kept; "
            "set offload=none, or rollout.keep=false."
        )
    if rollout.keep and fp8:
        raise ConfigError(
            "rollout.keep=true with compute.fp8: training makes other FP8 copies of the weights than those that were "
            "captured; set rollout.keep=false."
        )


def check_drawn_by(spec: ModelSpec, layout: ParallelLayout, rollout: RolloutConfig, name: str) -> None:
    """Raise LayoutError where the model `name` cannot be split as rollout.layout says."""
    other = elsewhere(layout, rollout)
    sizes = {"heads": spec.heads, "query groups": spec.kv_heads, "ffn_size": spec.ffn_size}
    for what, size in sizes.items():
        if other is not None and size % other.tensor:
            raise LayoutError(
                f"{name} {what}={size} is not divisible by rollout.layout.tensor={other.tensor}; set "
                f"{_nearest(layout, other.tensor, sizes.values())}."
            )


def _nearest(layout: ParallelLayout, tensor: int, sizes: Iterable[int] = ()) -> str:
    """The one or two layouts for rollouts on the ranks of `layout` that split all `sizes` and are nearest `tensor`."""
    ranks = layout.world_size
    fitting = [
        count for count in range(1, ranks + 1) if ranks % count == 0 and all(size % count == 0 for size in sizes)
    ]
    nearest = sorted(sorted(fitting, key=lambda count: abs(count - tensor))[:2])
    return " or ".join(f"rollout.layout.tensor={count} rollout.layout.data={ranks // count}" for count in nearest)


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF over the vocabulary in index order.

        p = softmax(logits / temperature)        token = min {i : F(i) > u F(V)},  F the running sum of kept p

    Top-k and then top-p (over what top-k kept) decide which tokens are kept. Tokens tied with the last one kept are
    kept too: the choice then does not hang on the order in which a sort returns equals.

    Shapes:   logits [R, V]; uniforms [R] fp32 in (0, 1). Returns (tokens [R] int64, logprobs [R] fp32).
    Units:    logprobs in nats, of the *whole* softmax(logits / temperature), whatever top-k and top-p removed: what the
              trainer recomputes. At temperature 0, of softmax(logits).
    Ranks:    none (pure).
    """
    if temperature == 0.0:
        tokens = logits.argmax(-1)
        logprobs = logits.float().log_softmax(-1)
        return tokens, _pick(logprobs, tokens)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    kept = logprobs
    if top_k > 0:
        kept = _keep_top_k(kept, top_k)
    if top_p < 1.0:
        kept = _keep_top_p(kept, top_p)
    # In fp64 a parallel scan's rounding cannot lift the sum at a token without probability: such a token is never the
    # first to exceed the draw.
    mass = kept.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)
    # Only NaN logits find no token; their log-prob stays NaN, and the trainer refuses it.
    tokens = tokens[:, 0].clamp_(max=logits.shape[-1] - 1)
    return tokens, _pick(logprobs, tokens)


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def _keep_top_k(logprobs: Tensor, top_k: int) -> Tensor:
    least = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
    return logprobs.masked_fill(logprobs < least, float("-inf"))


def _keep_top_p(logprobs: Tensor, top_p: float) -> Tensor:
    ordered = logprobs.sort(dim=-1, descending=True).values
    share = ordered.softmax(-1)
    before = share.cumsum(-1) - share
    # The most likely token has nothing before it, so at least one is kept.
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return logprobs.masked_fill(logprobs < ordered.gather(-1, last), float("-inf"))


def occurrence(ids: Tensor) -> Tensor:
    """How many earlier entries are equal: ids [R] -> [R] int64."""
    order = ids.argsort(stable=True)
    place = torch.arange(len(ids), device=ids.device)
    _, counts = ids[order].unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(place).index_copy_(0, order, place - first)


def stream_ids(prompt_ids: Tensor, samples: Tensor) -> Tensor:
    """Name the random stream of each rollout: the `samples`-th one of prompt `prompt_ids`.

    Shapes:   both [R] int64. Returns [R] int64.
    """
    return _mix(_mix(prompt_ids) ^ samples)


def uniforms(seed: int, streams: Tensor, positions: Tensor) -> Tensor:
    """Random numbers by counting: entry (stream, position) is a hash of both and the seed, with no state between.

    Shapes:   streams, positions int64, broadcast together. Returns that shape, fp32.
    Units:    uniform on {(i + 1/2) / 2^23}: never 0, never 1.
    Source:   splitmix64's finaliser (Steele, Lea and Flood 2014), applied to seed, stream and position in turn.
    """
    key = _mix(torch.tensor(_signed(seed), dtype=torch.int64, device=streams.device))
    bits = _mix(_mix(key ^ streams) ^ positions)
    return (_shift(bits, 41).float() + 0.5) * 2.0**-23


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's is arithmetic, so the copies of the sign bit are cut off."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The int64 with the low 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63
