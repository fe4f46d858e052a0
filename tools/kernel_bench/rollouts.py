"""Cases of the kernels over rollouts: rewards and GAE, losses, attention over a paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megarlhf_kernels import (
    Clip,
    Discount,
    Shaping,
    clipped_policy_loss,
    clipped_value_loss,
    paged_decode,
    paged_prefill,
    rewards_gae,
)
from megarlhf_kernels.dispatch import Impl
from tools.kernel_bench.base import Case, Inputs, Maker, Outputs, Provider, Run, size_in_bytes

CLIP, VALUE_CLIP = 0.2, 0.2
DISCOUNT, KL_COEF = Discount(0.999, 0.95), 0.1


def rewards_gae_cases(maker: Maker) -> Iterator[Case]:
    """Rewards, advantages and returns of padded rollouts."""
    rows, width = maker.sizes.rollouts
    lengths = maker.whole(width // 2, width + 1, rows, seed=13)
    inputs = {
        "logprobs": maker.normal(rows, width, seed=14),
        "ref": maker.normal(rows, width, seed=15),
        "values": maker.normal(rows, width, seed=16),
        "mask": torch.arange(width, device=maker.device) < lengths[:, None],
        "terminated": maker.whole(0, 2, rows, seed=17) == 0,
        "scores": maker.normal(rows, seed=18),
    }

    def ours(impl: Impl) -> Run:
        def run(x: Inputs) -> Outputs:
            shaping = Shaping(x["ref"], x["scores"], KL_COEF)
            got = rewards_gae(x["logprobs"], x["values"], x["mask"], x["terminated"], shaping, DISCOUNT, impl=impl)
            return {"rewards": got.token_level_rewards, "advantages": got.advantages, "returns": got.returns}

        return run

    providers = maker.providers("rewards_gae", ours, loop_over_time, lacks="no moments")
    providers.append(Provider("torch lean loop", lean_loop_over_time, lacks="no moments"))
    work = size_in_bytes(inputs["logprobs"]) * 6 + size_in_bytes(inputs["mask"])
    yield Case("rewards_gae", f"[{rows}, {width}]", inputs, loop_over_time, providers, work)


def loop_over_time(x: Inputs) -> Outputs:
    """GAE as trainers write it: a Python loop over time steps. Responses start at the left."""
    mask, rewards, values, truncated = _shaped(x)
    width, advantage, reverse = mask.shape[1], torch.zeros_like(values[:, 0]), []
    rewards_and_bootstrap = rewards + truncated
    for t in reversed(range(width)):
        next_value = values[:, t + 1] if t + 1 < width else 0.0
        delta = rewards_and_bootstrap[:, t] + DISCOUNT.gamma * next_value - values[:, t]
        advantage = delta + DISCOUNT.gamma * DISCOUNT.lam * advantage
        reverse.append(advantage)
    advantages = torch.stack(reverse[::-1], 1)
    return {"rewards": rewards, "advantages": advantages, "returns": advantages + values}


def lean_loop_over_time(x: Inputs) -> Outputs:
    """The same with everything but the recursion outside the loop, and time first: one operation a step."""
    _, rewards, values, truncated = _shaped(x)
    deltas = rewards + truncated - values
    deltas[:, :-1] += DISCOUNT.gamma * values[:, 1:]
    scanned = deltas.t().contiguous()
    for t in range(len(scanned) - 2, -1, -1):
        scanned[t].add_(scanned[t + 1], alpha=DISCOUNT.gamma * DISCOUNT.lam)
    advantages = scanned.t().contiguous()
    return {"rewards": rewards, "advantages": advantages, "returns": advantages + values}


def _shaped(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, rewards and values, and gamma times the last value of rows that were cut, at their last token."""
    mask = x["mask"]
    rewards = torch.where(mask, -KL_COEF * (x["logprobs"] - x["ref"]), 0.0)
    values = torch.where(mask, x["values"], 0.0)
    row, last = torch.arange(len(mask), device=mask.device), mask.sum(1) - 1
    rewards[row, last] += x["scores"]
    truncated = torch.zeros_like(rewards)
    truncated[row, last] = torch.where(x["terminated"], 0.0, DISCOUNT.gamma * values[row, last])
    return mask, rewards, values, truncated


def policy_value_loss_cases(maker: Maker) -> Iterator[Case]:
    """Clipped policy and value losses, both with their gradients."""
    rows, width = maker.sizes.rollouts
    old, values, far = (maker.normal(rows, width, seed=seed) for seed in (19, 20, 24))
    inputs = {
        "old": old,
        "new": old + maker.step(rows, width, seed=21),
        "advantages": maker.normal(rows, width, seed=22),
        "values": values,
        "new_values": values + maker.step(rows, width, seed=23),
        # Farther from the old values than the new ones are: else both branches can be equal.
        "returns": values + far + far.sign(),
        "mask": maker.whole(0, 5, rows, width, seed=25) > 0,
    }

    def ours(impl: Impl) -> Run:
        def run(x: Inputs) -> Outputs:
            policy, *_ = clipped_policy_loss(
                x["new"], x["old"], x["advantages"], x["mask"], clip=Clip(CLIP, CLIP), impl=impl
            )
            value, *_ = clipped_value_loss(
                x["new_values"], x["values"], x["returns"], x["mask"], value_clip_range=VALUE_CLIP, impl=impl
            )
            return {"policy": policy, "value": value}

        return run

    providers = maker.providers("policy_value_loss", ours, _losses, lacks="no metrics")
    work = 8 * size_in_bytes(old) + 2 * size_in_bytes(inputs["mask"])
    leaves = ("new", "new_values")
    yield Case("policy_value_loss", f"[{rows}, {width}]", inputs, _losses, providers, work, leaves=leaves)


def _losses(x: Inputs) -> Outputs:
    ratio = (x["new"] - x["old"]).exp()
    policy = torch.maximum(-x["advantages"] * ratio, -x["advantages"] * ratio.clamp(1 - CLIP, 1 + CLIP))
    moved = x["new_values"].clamp(x["values"] - VALUE_CLIP, x["values"] + VALUE_CLIP)
    value = torch.maximum((x["new_values"] - x["returns"]) ** 2, (moved - x["returns"]) ** 2)
    return {"policy": (policy * x["mask"]).sum(), "value": 0.5 * (value * x["mask"]).sum()}


def paged_decode_cases(maker: Maker) -> Iterator[Case]:
    """One query a row: bound by reading the cache."""
    rows, longest = maker.sizes.decode
    heads, kv_heads, width = maker.sizes.heads
    inputs, lengths = _cache(maker, rows, longest)
    inputs["q"] = maker.normal(rows, 1, heads, width, seed=30, dtype=maker.dtype)

    def ours(impl: Impl) -> Run:
        return lambda x: {
            "out": paged_decode(x["q"], x["k"], x["v"], x["lengths"], causal=True, block_table=x["table"], impl=impl)
        }

    def plain(x: Inputs) -> Outputs:
        k, v = (_pages(x[name], x["table"]).transpose(1, 2) for name in "kv")
        seen = torch.arange(k.shape[2], device=k.device) < x["lengths"][:, None, None, None]
        out = scaled_dot_product_attention(x["q"].transpose(1, 2), k, v, attn_mask=seen, enable_gqa=True)
        return {"out": out.transpose(1, 2)}

    def definition(x: Inputs) -> Outputs:
        k, v = (_pages(x[name], x["table"]) for name in "kv")
        return {"out": _attention(x["q"], k, v, x["lengths"][:, None] - 1)}

    providers = maker.providers("paged_decode", ours, plain)
    read = 2 * sum(lengths) * kv_heads * width * inputs["k"].element_size()
    work, shape = read + 2 * size_in_bytes(inputs["q"]), f"{rows} rows of <= {longest} keys"
    yield Case("paged_decode", shape, inputs, definition, providers, work, shared=("k", "v"))


def paged_prefill_cases(maker: Maker) -> Iterator[Case]:
    """Prompts whose keys are in the cache already: bound by the matrix products of each query and the keys it sees."""
    rows, longest = maker.sizes.prefill
    heads, _, width = maker.sizes.heads
    inputs, lengths = _cache(maker, rows, longest)
    inputs["q"] = maker.normal(sum(lengths), heads, width, seed=31, dtype=maker.dtype)
    inputs["starts"] = torch.tensor([0, *lengths], device=maker.device).cumsum(0).int()

    def ours(impl: Impl) -> Run:
        def run(x: Inputs) -> Outputs:
            bounds = x["starts"], x["starts"], longest, longest
            return {
                "out": paged_prefill(x["q"], x["k"], x["v"], *bounds, causal=True, block_table=x["table"], impl=impl)
            }

        return run

    def rows_of(x: Inputs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        k, v = (_pages(x[name], x["table"]) for name in "kv")
        for row, q in enumerate(x["q"].split(lengths)):
            yield q[None], k[row : row + 1, : len(q)], v[row : row + 1, : len(q)]

    def plain(x: Inputs) -> Outputs:
        heads_first = ([tensor.transpose(1, 2) for tensor in row] for row in rows_of(x))
        done = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in heads_first]
        return {"out": torch.cat([out.transpose(1, 2)[0] for out in done])}

    def definition(x: Inputs) -> Outputs:
        done = [_attention(q, k, v, torch.arange(q.shape[1], device=q.device)[None]) for q, k, v in rows_of(x)]
        return {"out": torch.cat(done, 1)[0]}

    providers = maker.providers("paged_prefill", ours, plain)
    flop, shape = 4.0 * heads * width * sum(n * (n + 1) / 2 for n in lengths), f"{rows} rows of <= {longest} queries"
    yield Case("paged_prefill", shape, inputs, definition, providers, flop, "matmul", splits=False)


def _cache(maker: Maker, rows: int, longest: int) -> tuple[Inputs, list[int]]:
    """Keys and values of rows of different lengths, whose blocks lie in random order; and the lengths."""
    _, kv_heads, width = maker.sizes.heads
    columns = -(-longest // maker.sizes.page)
    order = maker.normal(rows * columns, seed=26).argsort().int()
    lengths = maker.whole(max(1, longest // 2), longest + 1, rows, seed=27).int()
    shape = (rows * columns, maker.sizes.page, kv_heads, width)
    cache = {name: maker.normal(*shape, seed=seed, dtype=maker.dtype) for name, seed in (("k", 28), ("v", 29))}
    return {**cache, "table": order.view(rows, columns), "lengths": lengths}, lengths.tolist()


def _pages(cache: Tensor, table: Tensor) -> Tensor:
    """Each row's tokens: [rows, tokens, kv_heads, d]."""
    return cache[table.long()].flatten(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """As one would write it down: q [rows, n, heads, d], k and v [rows, l, kv_heads, d], position [rows, n]."""
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("rnkgd,rlkd->rnkgl", grouped, k) * q.shape[-1] ** -0.5
    unseen = torch.arange(k.shape[1], device=k.device) > position[:, :, None]
    weights = scores.masked_fill(unseen[:, :, None, None], float("-inf")).softmax(-1)
    return torch.einsum("rnkgl,rlkd->rnkgd", weights, v).flatten(2, 3)
