"""GRPO and its relatives in one file of plain torch: read it top to bottom, run it in under a minute.

    python examples/01_grpo_by_hand.py              # GRPO
    python examples/01_grpo_by_hand.py gspo         # or any other name in FAMILY

A tiny Llama has to count on from the last digit it is shown, and stop after 9:

    prompt  <bos> 4 2 6        wanted response  7 8 9 <eos>

It first imitates a careless writer, who gets four tokens in ten wrong. Then it answers every prompt several times, a
rule scores the answers, and each becomes likelier or less likely as it is better or worse than the prompt's others: no
critic. Nothing here comes from the library, so that `grpo_step` can judge the library's step, tensor by tensor.

Every per-token tensor is [B, T], where index t is about token t + 1: the token that the model predicts at position t.
Rows of one prompt are neighbours. Outside of the response, rewards, advantages and weights are exactly 0.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

# 1. The settings. An algorithm is a choice of advantage, ratio, surrogate and mean; the papers' are in FAMILY.

MAX_NEW = 12


@dataclass(frozen=True)
class Settings:
    """What GRPO and its relatives need to know. "reinforce" is REINFORCE++."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline"] = "grpo"
    group_size: int = 8  # responses per prompt; at least 2 where there is a group
    std_correction: int = 1  # grpo divides by the group's std, of divisor group_size - std_correction, plus std_eps
    std_eps: float = 1e-6
    gamma: float = 1.0  # of REINFORCE++'s returns
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO's
    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2  # the ratio counts from 1 - clip_low to 1 + clip_high
    clip_high: float = 0.2
    dual_clip: float = math.inf  # a token of advantage A < 0 loses -dual_clip A at most
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    max_response: int = MAX_NEW  # in the divisor of "constant"
    kl_coef: float = 0.02
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_place: Literal["reward", "loss"] = "loss"
    correction: Literal["none", "truncate", "mask", "sequence_mask"] = "none"  # of another sampler than the trainer
    correction_low: float = 0.5
    correction_high: float = 2.0
    missing_eos_score: float = -1.0  # replaces the score of a response that never stopped
    temperature: float = 1.0  # divides the logits of sampler, actor and reference alike
    lr: float = 1e-3
    sft_lr: float = 3e-3
    sft_steps: int = 100
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0
    rollout_batch: int = 256  # responses, not prompts
    mini_batch: int = 64
    epochs: int = 2
    iterations: int = 20
    seed: int = 1


FAMILY = {
    "grpo": Settings(loss_mean="sequence"),  # Shao et al. 2024, arXiv 2402.03300
    "dr_grpo": Settings(advantage="dr_grpo", loss_mean="constant", kl_coef=0.0),  # Liu et al. 2025, 2503.20783
    "dapo": Settings(clip_high=0.28, kl_coef=0.0),  # Yu et al. 2025, 2503.14476; neither filter nor length penalty
    "gspo": Settings(ratio="sequence", loss_mean="sequence", clip_low=3e-4, clip_high=4e-4),  # Zheng et al., 2507.18071
    "cispo": Settings(surrogate="cispo", clip_low=1.0, clip_high=1.0),  # MiniMax 2025, 2506.13585: no lower bound
    "rloo": Settings(advantage="rloo", kl_estimator="k1", kl_place="reward"),  # Ahmadian et al. 2024, 2402.14740
    "reinforce": Settings(advantage="reinforce", group_size=1, kl_estimator="k1", kl_place="reward"),  # Hu, 2501.03262
    "reinforce_baseline": Settings(advantage="reinforce_baseline", kl_estimator="k2"),  # the same
}


# 2. The task: tokens 0..9 are digits, and a padding token that is not the end of a response.

EOS, PAD, BOS, VOCAB = 10, 11, 12, 13  # EOS is 10, so that the wanted token is always the one before it plus 1
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # tokens [R, T+1], lengths [R]: next tokens, log-probs [R]


@dataclass(frozen=True)
class Rollouts:
    """Prompts, each directly followed by a response and then by padding; a prompt's rows are neighbours."""

    tokens: Tensor  # [B, T+1] int64
    prompt_lengths: Tensor  # [B] int64
    lengths: Tensor  # [B] int64: prompt and response, EOS included
    terminated: Tensor  # [B] bool: the response ended with EOS
    scores: Tensor  # [B] fp32: what the rule (or a reward model) said, before any penalty
    sampler_logprobs: Tensor  # [B, T] fp32: of the program that sampled, which may be another than the trainer
    response_mask: Tensor  # [B, T] bool: True where the token predicted at t belongs to the response


def respond(count: int, copies: int, choose: Choose, generator: torch.Generator) -> Rollouts:
    """`copies` responses to each of `count` prompts, <bos> and 1 to 3 random digits: what `choose` says, until EOS."""
    digits = torch.randint(0, 10, (count, 3), generator=generator)
    prompt_lengths = torch.randint(2, 5, (count,), generator=generator).repeat_interleave(copies)
    prompts = torch.cat([torch.full((count, 1), BOS), digits], dim=1).repeat_interleave(copies, dim=0)
    prompts = prompts.masked_fill(torch.arange(4) >= prompt_lengths[:, None], PAD)
    tokens, lengths = nn.functional.pad(prompts, (0, MAX_NEW), value=PAD), prompt_lengths.clone()
    logprobs = torch.zeros(tokens[:, 1:].shape)
    running = torch.arange(len(tokens))
    while len(running):
        ends = lengths[running]
        chosen, logprobs[running, ends - 1] = choose(tokens[running], ends)
        tokens[running, ends] = chosen
        lengths[running] += 1
        running = running[(chosen != EOS) & (ends + 1 < prompt_lengths[running] + MAX_NEW)]
    token = torch.arange(1, tokens.shape[1])
    mask = (token >= prompt_lengths[:, None]) & (token < lengths[:, None])
    terminated = tokens.gather(1, lengths[:, None] - 1).squeeze(1) == EOS
    return Rollouts(tokens, prompt_lengths, lengths, terminated, judge(tokens, mask), logprobs, mask)


def judge(tokens: Tensor, mask: Tensor) -> Tensor:
    """The share of response tokens that are the token before them plus 1: [B] in 0..1."""
    right = (tokens[:, 1:] == tokens[:, :-1] + 1) & (tokens[:, 1:] <= EOS) & mask
    return right.sum(dim=1) / mask.sum(dim=1)


# 3. The model, and imitation.
def tiny_llama() -> LlamaConfig:
    """Two layers of width 64, with grouped-query attention as in Llama 3."""
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return LlamaConfig.from_dict({**tokens, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2})


def imitate(actor: nn.Module, settings: Settings, generator: torch.Generator) -> None:
    """Supervised fine-tuning on demonstrations: each token is the wanted one, or with probability 0.4 any."""

    def careless(tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        wanted = tokens.gather(1, ends[:, None] - 1).squeeze(1) + 1
        anything = torch.randint(0, EOS + 1, wanted.shape, generator=generator)
        chance = torch.rand(wanted.shape, generator=generator)
        return torch.where(chance < 0.4, anything, wanted), torch.zeros_like(chance)

    optimizer = make_optimizer(actor, settings.sft_lr, settings)
    for _ in range(settings.sft_steps):
        shown = respond(settings.mini_batch, 1, careless, generator)
        actor.zero_grad()
        (-token_logprobs(actor, shown.tokens, temperature=1.0)[shown.response_mask].mean()).backward()
        update(actor, optimizer, settings)


# 4. Roll out. Rows are right-padded and attention is causal, so no real token ever sees padding: no mask is needed.
@torch.no_grad()
def roll_out(actor: nn.Module, settings: Settings, generator: torch.Generator) -> Rollouts:
    """Sample `rollout_batch` responses, `group_size` to a prompt, and judge them."""

    def sample(tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        logits = actor(input_ids=tokens, use_cache=False).logits[torch.arange(len(tokens)), ends - 1]
        logprobs = (logits / settings.temperature).log_softmax(dim=1)
        chosen = torch.multinomial(logprobs.exp(), 1, generator=generator)
        return chosen.squeeze(1), logprobs.gather(1, chosen).squeeze(1)

    return respond(settings.rollout_batch // settings.group_size, settings.group_size, sample, generator)


# 5. Score. Log-probs of the tokens that were sampled, and how far the policy is from its reference.
def token_logprobs(actor: nn.Module, tokens: Tensor, temperature: float) -> Tensor:
    """[B, T+1] int64 to [B, T]: log p(token t + 1 | tokens up to t)."""
    logits = actor(input_ids=tokens[:, :-1], use_cache=False).logits.float() / temperature
    return logits.log_softmax(dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """With x = logprobs - ref_logprobs: k1 = x, k2 = x^2 / 2, k3 = e^-x - 1 + x. Any shape, elementwise."""
    x = logprobs - ref_logprobs
    return {"k1": x, "k2": x**2 / 2, "k3": torch.expm1(-x) + x}[estimator]


def kl_in_loss(new_logprobs: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL weighted by new / old, so that its mean *gradient* over tokens of the old policy is that of the new one's KL.

    The weight carries gradient for k1 and k3, whose mean is the KL; not for k2, of which only the gradient is right.
    """
    ratio = (new_logprobs - logprobs).exp()
    return (ratio.detach() if estimator == "k2" else ratio) * kl(new_logprobs, ref_logprobs, estimator)


# 6. Estimate. A reward for every token, and from it how much better than expected each token was.
def reward_tokens(rollouts: Rollouts, logprobs: Tensor, ref_logprobs: Tensor, settings: Settings) -> Tensor:
    """The score on the last response token; with kl_place "reward" also -kl_coef KL on every one: [B, T]."""
    rewards = torch.zeros_like(logprobs)
    if settings.kl_place == "reward":
        kls = kl(logprobs, ref_logprobs, settings.kl_estimator)
        rewards = torch.where(rollouts.response_mask, -settings.kl_coef * kls, 0.0)
    scores = torch.where(rollouts.terminated, rollouts.scores, settings.missing_eos_score)
    rewards[torch.arange(len(scores)), rollouts.lengths - 2] += scores  # token `lengths - 1` has index `lengths - 2`
    return rewards


def group_advantages(rewards: Tensor, settings: Settings) -> Tensor:
    """[B] to [B]: each reward against the others of its group. A group of equal rewards gets exactly 0.

    grpo: (r - mean) / (std + eps)      rloo: r - mean of the other rows      else: r - mean
    """
    groups = rewards.view(-1, settings.group_size)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)  # whose mean may be rounded
    centred = torch.where(equal, 0.0, groups - groups.mean(dim=1, keepdim=True))
    if settings.advantage == "grpo":
        centred = centred / (groups.std(dim=1, correction=settings.std_correction, keepdim=True) + settings.std_eps)
    elif settings.advantage == "rloo":
        centred = centred * settings.group_size / (settings.group_size - 1)
    return centred.flatten()


def token_advantages(rewards: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """Token rewards to advantages, [B, T] both.

    reinforce: return_t = r_t + gamma return_{t+1}. All others: the row's number on each of its tokens. REINFORCE++'s
    two are then whitened: mean 0 and variance 1 over all response tokens of the batch.
    """
    if settings.advantage == "reinforce":
        step = torch.arange(rewards.shape[1])
        advantages = rewards @ (settings.gamma ** (step[:, None] - step)).tril()
    else:
        advantages = group_advantages(rewards.sum(dim=1), settings)[:, None].expand_as(rewards)
    if settings.advantage in ("reinforce", "reinforce_baseline"):
        chosen = advantages[mask]
        advantages = (advantages - chosen.mean()) * torch.rsqrt(chosen.var(unbiased=False) + 1e-8)
    return advantages * mask


def sampler_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """[B, T]: w = p(trainer) / p(sampler), cut at high; or 0 unless it, or its row's geometric mean, is in [low, high].

    A token of weight 0 still counts in the loss's divisor.
    """
    low, high = settings.correction_low, settings.correction_high
    log_weights = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    judged = (row_means(log_weights, mask) if settings.correction == "sequence_mask" else log_weights).exp()
    weights = log_weights.exp()
    corrected = {"none": torch.ones_like(weights), "truncate": weights.clamp(max=high)}
    return corrected.get(settings.correction, torch.where((judged >= low) & (judged <= high), weights, 0.0)) * mask


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] to [B, 1]: over response tokens."""
    return torch.where(mask, values, 0.0).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def estimate(actor: nn.Module, ref_logprobs: Tensor, rollouts: Rollouts, settings: Settings) -> dict[str, Tensor]:
    """Everything the optimiser needs to know about the rollouts: [B, T] each."""
    mask = rollouts.response_mask
    logprobs = token_logprobs(actor, rollouts.tokens, settings.temperature)
    rewards = reward_tokens(rollouts, logprobs, ref_logprobs, settings)
    advantages = token_advantages(rewards, mask, settings)
    weights = sampler_weights(logprobs, rollouts.sampler_logprobs, mask, settings)
    return {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "token_level_rewards": rewards,
        "advantages": advantages,
        "sampler_weights": weights,
        "weighted_advantages": advantages * weights,
        "response_mask": mask,
    }


# 7. Optimise.
def importance_ratio(new_logprobs: Tensor, logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """[B, T]: r = new / old probability of each token; or s, the geometric mean of the row's, on every token of it.

    s is written stopped(s) r / stopped(r), so that each token's share of its gradient is its own.
    """
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    if level == "sequence":
        log_ratio = row_means(log_ratio.detach(), mask) + (log_ratio - log_ratio.detach())
    return log_ratio.exp()


def policy_loss(ratio: Tensor, new_logprobs: Tensor, advantages: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(loss, whether it was clipped) of each token, [B, T] both.

    clip:   max(-A ratio, -A clip(ratio)), and for A < 0 no more than -dual_clip A
    cispo:  -A stopped(clip(ratio)) logprob: a clipped token still learns
    """
    clipped_ratio = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.surrogate == "cispo":
        return -advantages * clipped_ratio.detach() * new_logprobs, clipped_ratio != ratio
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    most = torch.where(advantages < 0, -settings.dual_clip * advantages, math.inf)
    return torch.minimum(torch.maximum(unclipped, clipped), most), clipped > unclipped


def loss_mean(losses: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """[B, T] to a number: over response tokens alike; over rows alike; or with a divisor that no length changes."""
    return {
        "token": losses[mask].mean(),
        "sequence": row_means(losses, mask).mean(),
        "constant": losses[mask].sum() / (len(losses) * settings.max_response),
    }[settings.loss_mean]


def total_loss(new_logprobs: Tensor, experience: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The loss of these rows, its two parts, and the share of tokens that were clipped."""
    logprobs, mask = experience["logprobs"], experience["response_mask"]
    ratio = importance_ratio(new_logprobs, logprobs, mask, settings.ratio)
    losses, clipped = policy_loss(ratio, new_logprobs, experience["weighted_advantages"], settings)
    policy = loss = loss_mean(losses, mask, settings)
    kls = kl_in_loss(new_logprobs, logprobs, experience["ref_logprobs"], settings.kl_estimator)
    distance = loss_mean(kls, mask, settings)
    if settings.kl_place == "loss":
        loss = policy + settings.kl_coef * distance
    return {"loss": loss, "policy_loss": policy, "kl_loss": distance, "clip_fraction": clipped[mask].float().mean()}


def make_optimizer(model: nn.Module, lr: float, settings: Settings) -> torch.optim.AdamW:
    """AdamW without weight decay; eps is 1e-5, not torch's 1e-8."""
    return torch.optim.AdamW(model.parameters(), lr, settings.adam_betas, settings.adam_eps, weight_decay=0.0)


def backward(actor: nn.Module, tokens: Tensor, experience: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The loss on these rows; its gradient is left in the actor."""
    losses = total_loss(token_logprobs(actor, tokens, settings.temperature), experience, settings)
    actor.zero_grad()
    losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> Tensor:
    """Clip the gradient's global norm, step, and return the norm it had."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    return norm


def grpo_step(actor: nn.Module, ref_logprobs: Tensor, rollouts: Rollouts, settings: Settings) -> dict[str, Tensor]:
    """Exactly one step of a fresh optimiser on all rows at once; changes the actor, reports everything.

    Besides the tensors of `estimate` and the losses: "actor_grad_norm", and for every parameter "actor_grad/<name>"
    (before clipping) and "actor_weight/<name>" (after the step).
    """
    experience = estimate(actor, ref_logprobs, rollouts, settings)
    report = {**experience, **backward(actor, rollouts.tokens, experience, settings)}
    report |= {f"actor_grad/{name}": p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    report["actor_grad_norm"] = update(actor, make_optimizer(actor, settings.lr, settings), settings)
    report |= {f"actor_weight/{name}": p.detach().clone() for name, p in actor.named_parameters()}
    return report


# 8. The loop.
def train(settings: Settings, *, log_every: int = 5) -> list[dict[str, float]]:
    """Imitate; then roll out, score, estimate and optimise, again and again. One dictionary of metrics each time."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    actor, reference = LlamaForCausalLM(tiny_llama()), LlamaForCausalLM(tiny_llama())
    imitate(actor, settings, generator)
    reference.load_state_dict(actor.state_dict())
    optimizer = make_optimizer(actor, settings.lr, settings)
    history = []
    for iteration in range(settings.iterations):
        rollouts = roll_out(actor, settings, generator)
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, rollouts.tokens, settings.temperature)
        experience = estimate(actor, ref_logprobs, rollouts, settings)
        clipped = []
        for _ in range(settings.epochs):
            for index in torch.randperm(len(rollouts.tokens), generator=generator).split(settings.mini_batch):
                rows = {name: value[index] for name, value in experience.items()}
                clipped.append(backward(actor, rollouts.tokens[index], rows, settings)["clip_fraction"].item())
                update(actor, optimizer, settings)
        mask = rollouts.response_mask
        metrics = {
            "score": rollouts.scores.mean().item(),
            "stopped": rollouts.terminated.float().mean().item(),
            "length": mask.sum(dim=1).float().mean().item(),
            "kl": ((experience["logprobs"] - ref_logprobs) * mask).sum(dim=1).mean().item(),
            "clip": sum(clipped) / len(clipped),
        }
        history.append(metrics)
        if log_every and (iteration % log_every == 0 or iteration == settings.iterations - 1):
            print(f"{iteration:3d}  " + "  ".join(f"{name} {value:6.3f}" for name, value in metrics.items()))
    return history


def main() -> None:
    """Train once and say what came of it."""
    start = time.perf_counter()
    history = train(FAMILY[sys.argv[1] if len(sys.argv) > 1 else "grpo"])
    seconds = time.perf_counter() - start
    print(f"score {history[0]['score']:.2f} -> {history[-1]['score']:.2f} in {seconds:.0f} s (1.00 is perfect)")


if __name__ == "__main__":
    main()
