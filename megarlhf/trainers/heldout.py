"""Prompts that a policy is measured on while it learns: the same ones each time, and the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.config import Config
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.rows import DataConfig, is_generated
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.eval.accuracy import roll_out
from megarlhf.judges.panel import Panel
from megarlhf.judges.texts import Reader
from megarlhf.judges.verifiers import Decider, is_told_right
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.kl import kl_k1, kl_k3
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig
from megarlhf.runtime.checks import Model
from megarlhf.runtime.policy_models import PolicyModels
from megarlhf.runtime.texts import check_apart, chosen_heldout

PROMPTS = 256
"""Of what is generated, where nobody says how many: 6 points to either side are the interval of a half."""


@dataclass(frozen=True)
class HeldOut:
    """Prompts that are not learnt from."""

    asked: DataConfig
    """The setting."""
    data: DataConfig
    """The same with nothing left open."""
    prompts: PromptSet
    shared: str
    """What is to be said of those that are learnt from all the same."""

    def logged(self, verifier: Decider | None, *, reference: bool) -> set[str]:
        """Metrics of a measurement; reference: whether there is one."""
        accuracy = {"eval/accuracy"} if is_told_right(verifier, self.prompts) else set[str]()
        kl = {"eval/kl_mean", "eval/kl_k3_mean"} if reference else set[str]()
        return {"eval/score_mean", "eval/response_length_mean", "eval/truncated_fraction"} | accuracy | kl


def held_out(
    asked: DataConfig | None, eval_every: int, data: DataConfig, trained: PromptSet, actor: Model, tokenizer: Tokenizer
) -> HeldOut | None:
    """The prompts of the setting `heldout`; without it, where something is to be measured, those that `data` holds out.

    data, trained: what is learnt from. None where nothing is measured.
    Raises:   as `load_prompts`; ConfigError where nothing is held out, or all of it is learnt from.
    """
    if asked is None and not eval_every:
        return None
    if asked is None and not is_generated(data.source):
        raise ConfigError(
            f"eval_every={eval_every}: nothing is held out of prompts.source={data.named}; set heldout.source to "
            "prompts that are not learnt from, or eval_every=0."
        )
    asked = asked or data.model_copy(update={"split": "heldout", **_fewer(data)})
    chosen = chosen_heldout(asked, "heldout", actor)
    prompts = load_prompts(chosen, tokenizer)
    shared = check_apart("heldout", prompts.tokens, {"prompts": trained.tokens})
    return HeldOut(asked, chosen, prompts, shared)


def _fewer(data: DataConfig) -> Mapping[str, Config]:
    """What generates, with at most PROMPTS rows."""
    parts = {"arithmetic": data.arithmetic, "programs": data.programs, "reasoning_gym": data.reasoning_gym}
    return {name: part.model_copy(update={"rows": min(part.rows, PROMPTS)}) for name, part in parts.items()}


def measure_policy(
    cast: PolicyModels, panel: Panel, reader: Reader, sampling: SamplingConfig, *, rollout: RolloutConfig, seed: int
) -> Metrics:
    """Accuracy, score and distance to the reference of one response to each prompt of the reader.

    panel: judges who read those prompts. The responses are those of `megarlhf eval` with these settings and this seed.
    Ranks:    collective; equal on every rank.
    """
    cast.sampler.release()  # what it keeps for the next iteration would leave no room beside it
    parts: list[dict[str, Tensor]] = []
    correct: list[bool] = []
    for drawn in roll_out(cast.actor, reader, sampling, rollout=rollout, seed=seed):
        judgement = panel.judge(drawn)
        correct += [right for right in judgement.correct if right is not None]
        said = {
            "eval/score_mean": judgement.scores,
            "eval/response_length_mean": drawn.response_lengths,
            "eval/truncated_fraction": ~drawn.terminated,
        }
        parts.append({**said, **_distances(cast, drawn)})
    means = {name: float(torch.cat([part[name] for part in parts]).double().mean()) for name in parts[0]}
    scores = torch.cat([part["eval/score_mean"] for part in parts]).double()
    counted = {"eval/prompts": float(len(scores)), "eval/score_std": float(scores.std(correction=0))}
    right = {"eval/accuracy": correct.count(True) / len(correct), "eval/verified": len(correct)} if correct else {}
    return {**right, **means, **counted}


def _distances(cast: PolicyModels, drawn: Rollout) -> dict[str, Tensor]:
    """[B] each, in nats a response; nothing without a reference."""
    if cast.reference is None:
        return {}
    logprobs, ref_logprobs = cast.actor.score(drawn), cast.reference.score(drawn)
    tokens = {"eval/kl_mean": kl_k1(logprobs, ref_logprobs), "eval/kl_k3_mean": kl_k3(logprobs, ref_logprobs)}
    return {name: torch.where(drawn.response_mask, kl, 0.0).sum(1) for name, kl in tokens.items()}
