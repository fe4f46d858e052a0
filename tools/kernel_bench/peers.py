"""Other people's kernels for the benchmark, each imported when it is asked for.

A peer's run takes the case's inputs and returns the outputs it has, under the names that the case's definition gives
them. What it lacks next to ours is said in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from tools.kernel_bench.base import Case, Inputs, Outputs, Provider, Run
from tools.kernel_bench.vocabulary import CLIP

FORWARD, FULL = "forward", "forward+backward"
LOGPROB = (("linear_logprob", FORWARD), ("linear_logprob", FULL))
LINEAR = (*LOGPROB, ("linear_ppo", FULL))
LOGITS = (("token_logprob", FORWARD), ("token_logprob", FULL))
ROWS = 1024
"""Tokens in a chunk of Liger's GRPO loss, whose default of 1 is meant for whole sequences."""


@dataclass(frozen=True)
class Peer:
    """A kernel of another package."""

    name: str
    package: str
    """The distribution, as pip knows it."""
    load: Callable[[], Run]
    """Import it; ImportError says why it cannot be had."""
    serves: tuple[tuple[str, str], ...]
    """(kernel, passes) of the cases it is a peer in."""
    lacks: str = ""
    per_token: bool = True
    """Whether every token can have an upstream gradient of its own, or a loss term of its own."""
    devices: tuple[str, ...] = ("cuda",)


def _function(module: str, name: str) -> Any:
    found = import_module(module)
    if name not in vars(found):
        raise ImportError(f"{module} has no {name}; install a newer version")
    return vars(found)[name]


def _liger_scaled() -> Run:
    apply = _function("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction").apply

    def run(x: Inputs) -> Outputs:
        # Positions: temperature, ignore_index, tiles of rows a cluster, entropy.
        nll, entropy = apply(x["hidden"], x["weight"], x["labels"], 1.0, -100, 1, True)
        return {"logprobs": -nll, "entropy": entropy.float()}

    return run


def _liger_flce() -> Run:
    loss = _function("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda x: {"nll_sum": loss(x["hidden"], x["weight"], x["labels"], reduction="sum")}


def _liger_grpo() -> Run:
    """Every token is a sequence of its own, which gives it an advantage of its own; loss_type bnpo is the mean."""
    from_hidden = _function("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def run(x: Inputs) -> Outputs:
        options = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "chunk_size": ROWS}
        module = from_hidden(compiled=x["hidden"].is_cuda, epsilon_low=CLIP, epsilon_high=CLIP, **options)
        hidden, labels, old = (x[name][:, None] for name in ("hidden", "labels", "old"))
        mask = torch.ones_like(labels)
        loss, _ = module(hidden, x["weight"], labels, mask, x["advantages"], old_per_token_logps=old)
        return {"surrogate": loss * len(mask)}

    return run


def _cut_cross_entropy() -> Run:
    loss = _function("cut_cross_entropy", "linear_cross_entropy")
    return lambda x: {"logprobs": -loss(x["hidden"], x["weight"], x["labels"], reduction="none")}


def _quack_linear() -> Run:
    loss = _function("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x: {"nll_sum": loss(x["hidden"], x["weight"], x["labels"], reduction="sum")}


def _quack_logits() -> Run:
    loss = _function("quack.cross_entropy", "cross_entropy")
    return lambda x: {"logprobs": -loss(x["logits"], x["labels"], reduction="none")}


def _flash_logits() -> Run:
    loss = _function("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda x: {"logprobs": -loss(x["logits"], x["labels"])[0]}


def _flash_decode() -> Run:
    attend = _function("flash_attn", "flash_attn_with_kvcache")

    def run(x: Inputs) -> Outputs:
        names = {"cache_seqlens": x["lengths"], "block_table": x["table"]}
        return {"out": attend(x["q"], x["k"], x["v"], causal=True, **names)}

    return run


def _flash_prefill() -> Run:
    attend = _function("flash_attn", "flash_attn_varlen_func")

    def run(x: Inputs) -> Outputs:
        longest = x["k"].shape[1] * x["table"].shape[1]
        bounds = x["starts"], x["starts"], longest, longest
        return {"out": attend(x["q"], x["k"], x["v"], *bounds, causal=True, block_table=x["table"])}

    return run


ONE_SUM = "one sum: no log-prob, entropy or gradient of a token"
PEERS = (
    Peer("Liger scaled CE", "liger-kernel", _liger_scaled, LINEAR, devices=("cuda", "cpu")),
    Peer("Liger GRPO", "liger-kernel", _liger_grpo, LINEAR[2:], "no entropy, no KL", devices=("cuda", "cpu")),
    Peer("Liger FLCE", "liger-kernel", _liger_flce, LINEAR, ONE_SUM, per_token=False),
    Peer("Cut CE", "cut-cross-entropy", _cut_cross_entropy, LINEAR, "no entropy"),
    Peer("QuACK linear CE", "quack-kernels", _quack_linear, LINEAR, ONE_SUM, per_token=False),
    Peer("QuACK CE", "quack-kernels", _quack_logits, LOGITS, "no entropy"),
    Peer("flash-attn CE", "flash-attn", _flash_logits, LOGITS, "no entropy"),
    Peer("flash-attn", "flash-attn", _flash_decode, (("paged_decode", FORWARD),)),
    Peer("flash-attn varlen", "flash-attn", _flash_prefill, (("paged_prefill", FORWARD),)),
)


def with_peers(case: Case, device: torch.device, missing: dict[str, str]) -> list[Provider]:
    """The case's providers, and every peer that can be had; `missing` is told why another cannot."""
    found = list(case.providers)
    for peer in PEERS:
        run = _load(peer, device, missing) if (case.kernel, case.passes) in peer.serves else None
        if run is not None:
            found.append(Provider(peer.name, case.adapt(run), peer.package, peer.lacks, peer.per_token))
    return found


def _load(peer: Peer, device: torch.device, missing: dict[str, str]) -> Run | None:
    try:
        run = peer.load()
    except (ImportError, OSError, RuntimeError) as error:  # not there, or there without what it needs
        missing[peer.name] = f"{peer.package}: {str(error).strip().splitlines()[0]}"
        return None
    if device.type not in peer.devices:
        missing[peer.name] = f"{peer.package}: needs a GPU"
        return None
    return run
