"""How often a policy is right on held-out problems: sampled as PPO samples it, and greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.judges.texts import Reader, Response, Scorer
from megarlhf.models.role import FrozenRole, Role
from megarlhf.observe.progress import Progress
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import USUAL, RolloutConfig, SamplingConfig

CHUNK = 512
"""Problems rolled out together."""


@dataclass(frozen=True)
class Evaluation:
    """Responses to held-out prompts, in the order of the data.

    Shapes:   correct [N] bool; scores [N] fp32, the reward model's, 0 without one; lengths [N] int64, response tokens.
    """

    responses: tuple[str, ...]
    correct: Tensor
    scores: Tensor
    lengths: Tensor
    terminated: Tensor


def roll_out(
    policy: Role, reader: Reader, sampling: SamplingConfig, *, rollout: RolloutConfig = USUAL, seed: int
) -> Iterator[Rollout]:
    """One response to each prompt of the reader in order, CHUNK at a time; what it depends on, `generate` says.

    Ranks:    collective over the policy's mesh; equal on every rank.
    """
    prompts = reader.prompts
    engine = RolloutEngine.of(policy, reader.tokenizer, prompts.longest + sampling.max_new_tokens, rollout)
    try:
        for chunk in torch.arange(len(prompts)).tensor_split(-(-len(prompts) // CHUNK)):
            yield engine.generate(prompts.batch(chunk), sampling, seed=seed)
    finally:
        engine.release()


def evaluate(
    policy: FrozenRole,
    reward: FrozenRole | None,
    reader: Reader,
    scorer: Scorer,
    sampling: SamplingConfig,
    *,
    rollout: RolloutConfig = USUAL,
    seed: int,
) -> Evaluation:
    """One response to each prompt of the reader, and scored where there is a reward model.

    scorer: says which responses are right.
    Ranks:    collective over the policy's mesh; every rank gets the whole Evaluation.
    """
    kind = "greedy" if sampling.temperature == 0 else "sampled"
    parts: list[Evaluation] = []
    with Progress(len(reader.prompts), f"evaluate, {kind}", enabled=policy.mesh.is_main) as bar:
        for drawn in roll_out(policy, reader, sampling, rollout=rollout, seed=seed):
            scores = torch.zeros(len(drawn)) if reward is None else reward.score(drawn)
            parts.append(_judged(drawn.to("cpu"), scores.cpu(), reader, scorer))
            bar.advance(len(drawn))
    return Evaluation(
        responses=tuple(text for part in parts for text in part.responses),
        correct=torch.cat([part.correct for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        terminated=torch.cat([part.terminated for part in parts]),
    )


def _judged(rollout: Rollout, scores: Tensor, reader: Reader, scorer: Scorer) -> Evaluation:
    def judged(responses: Sequence[Response]) -> list[tuple[str, bool]]:
        opinions = scorer(responses)
        return [(each.response, said.correct is True) for each, said in zip(responses, opinions, strict=True)]

    texts, verdicts = zip(*reader.spread(rollout, judged), strict=True)
    return Evaluation(texts, torch.tensor(verdicts), scores, rollout.response_lengths, rollout.terminated)
