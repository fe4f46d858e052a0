"""REINFORCE without a baseline (Williams 1992): an algorithm of one's own, whole."""

from __future__ import annotations

from megarlhf.batch.rollouts import PolicyRows, Prompts
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.policy_loop import Cast, Iteration, Turn, build_cast, old_logprobs, optimise, policy_trainer
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.policy_metrics import advantage_metrics, policy_metrics, rollout_metrics
from megarlhf.trainers.trainer import Learner


class ReinforceConfig(PolicyConfig):
    """Each token of a response is made as much likelier as the response scored."""


def reinforce_iteration(cast: Cast, prompts: Prompts, cfg: ReinforceConfig, turn: Turn) -> Iteration:
    """Roll out, score, optimise: once."""
    with turn.clock("rollout"):
        rollout = cast.sampler.generate(prompts, cfg.sampling, seed=turn.seed("rollout"), group_size=cfg.group_size)
    with turn.clock("score"):
        logprobs, judgement = old_logprobs(cast.actor, rollout, cfg), cast.panel.judge(rollout)
    with turn.clock("estimate"):
        mask, last = rollout.response_mask, rollout.lengths[:, None] - 2
        advantages = cast.shaper.shape(judgement.scores, rollout)[:, None] * mask
        rewards = advantages.new_zeros(advantages.shape).scatter(1, last, advantages.gather(1, last))
        rows = PolicyRows(rollout, logprobs, advantages)
        metrics = {
            **rollout_metrics(rollout, logprobs, judgement.scores, rewards),
            **advantage_metrics(advantages, mask),
        }
    with turn.clock("optimise"):
        loss = policy_loss(cast.actor, cfg)
        steps = optimise(cast.actor, loss, rows, turn, cfg)
    return Iteration(rollout, judgement, {**metrics, **policy_metrics(steps)})


LEARNERS = {"actor": Learner(PolicyRows, policy_loss)}
TRAINER = policy_trainer(ReinforceConfig, reinforce_iteration, models=build_cast, learners=LEARNERS)
