"""All of PPO for a language model in one file of plain torch: read it top to bottom, run it in under a minute.

    python examples/00_ppo_by_hand.py

A tiny Llama has to count on from the last digit it is shown, and stop after 9:

    prompt  <bos> 4 2 6        wanted response  7 8 9 <eos>

It first imitates a careless writer, who gets four tokens in ten wrong. Then it samples its own responses, a rule scores
them, and PPO makes it better than anything it was shown. Nothing here comes from the library (only torch, and the Llama
of transformers), so the library's PPO step is tested against `ppo_step`, tensor by tensor.

Every per-token tensor is [B, T], where index t is about token t + 1: the token that the model predicts at position t.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

# 1. The settings. Sources: Huang et al. 2024 (arXiv 2403.17031) for RLHF, Schulman et al. 2017 for PPO. The learning
#    rates and kl_coef differ from theirs (3e-6, 0.05): the model is far smaller, and so are its scores.


@dataclass(frozen=True)
class Settings:
    """What PPO needs to know."""

    temperature: float = 1.0
    """Divides the logits of sampler, actor and reference alike."""
    kl_coef: float = 0.02
    missing_eos_score: float = -1.0
    """Replaces the score of a response that never stopped."""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    actor_lr: float = 1e-3
    critic_lr: float = 3e-3
    sft_lr: float = 3e-3
    sft_steps: int = 100
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0
    rollout_batch: int = 256
    mini_batch: int = 64
    ppo_epochs: int = 2
    iterations: int = 20
    seed: int = 1


# 2. The task: tokens 0..9 are digits, and a padding token that is not the end of a response.

EOS, PAD, BOS, VOCAB = 10, 11, 12, 13
"""EOS is 10, so that the wanted token is always the one before it plus 1."""
MAX_NEW = 12


@dataclass(frozen=True)
class Rollouts:
    """Prompts, each directly followed by a response and then by padding."""

    tokens: Tensor
    """[B, T+1] int64"""
    prompt_lengths: Tensor
    """[B] int64"""
    lengths: Tensor
    """[B] int64: prompt and response, EOS included"""
    terminated: Tensor
    """[B] bool: the response ended with EOS"""
    scores: Tensor
    """[B] fp32: what the rule (or a reward model) said, before any penalty"""

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: True where the token predicted at t belongs to the response."""
        return response_mask(self.tokens, self.prompt_lengths, self.lengths)

    def rows(self, index: Tensor) -> Rollouts:
        """The chosen rows."""
        return Rollouts(*(value[index] for value in vars(self).values()))


def response_mask(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """[B, T] bool: True where token t + 1 lies between the prompt and the padding."""
    token = torch.arange(1, tokens.shape[1])
    return (token >= prompt_lengths[:, None]) & (token < lengths[:, None])


def make_prompts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """<bos> and 1 to 3 random digits, right-padded: tokens [B, 4], lengths [B]."""
    digits = torch.randint(0, 10, (count, 3), generator=generator)
    lengths = torch.randint(2, 5, (count,), generator=generator)
    tokens = torch.cat([torch.full((count, 1), BOS), digits], dim=1)
    return tokens.masked_fill(torch.arange(4) >= lengths[:, None], PAD), lengths


def write_carelessly(prompts: Tensor, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Demonstrations: each token is the wanted one, or with probability 0.4 any. Tokens [B, 4 + MAX_NEW], lengths."""

    def careless(tokens: Tensor, ends: Tensor) -> Tensor:
        wanted = tokens.gather(1, ends[:, None] - 1).squeeze(1) + 1
        anything = torch.randint(0, EOS + 1, wanted.shape, generator=generator)
        return torch.where(torch.rand(wanted.shape, generator=generator) < 0.4, anything, wanted)

    return write(prompts, lengths, careless)


def write(prompts: Tensor, lengths: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Append what `choose` says to every row until it says EOS: (tokens, lengths)."""
    tokens, lengths = nn.functional.pad(prompts, (0, MAX_NEW), value=PAD), lengths.clone()
    running = torch.arange(len(tokens))
    for _ in range(MAX_NEW):
        if not len(running):
            break
        chosen = choose(tokens[running], lengths[running])
        tokens[running, lengths[running]] = chosen
        lengths[running] += 1
        running = running[chosen != EOS]
    return tokens, lengths


def judge(tokens: Tensor, response_mask: Tensor) -> Tensor:
    """The share of response tokens that are the token before them plus 1: [B] in 0..1."""
    right = (tokens[:, 1:] == tokens[:, :-1] + 1) & (tokens[:, 1:] <= EOS) & response_mask
    return right.sum(dim=1) / response_mask.sum(dim=1)


# 3. The models, and imitation. Actor and reference are language models; the critic is a Llama with one number per
#    position.


class Critic(nn.Module):
    """A Llama whose head says how much reward it still expects."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.head = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(config.hidden_size + 1) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 to [B, T]: the value before token t + 1 is produced."""
        return self.head(self.model(input_ids=tokens, use_cache=False).last_hidden_state).squeeze(-1)


def tiny_llama() -> LlamaConfig:
    """Two layers of width 64, with grouped-query attention as in Llama 3."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def imitate(actor: LlamaForCausalLM, settings: Settings, generator: torch.Generator) -> None:
    """Supervised fine-tuning on careless demonstrations: cross-entropy on their response tokens."""
    optimizer = make_optimizer(actor, settings.sft_lr, settings)
    for _ in range(settings.sft_steps):
        prompts, prompt_lengths = make_prompts(settings.mini_batch, generator)
        tokens, lengths = write_carelessly(prompts, prompt_lengths, generator)
        loss = -token_logprobs(actor, tokens, temperature=1.0)[response_mask(tokens, prompt_lengths, lengths)].mean()
        optimizer.zero_grad()
        loss.backward()
        update(actor, optimizer, settings)


# 4. Roll out. Rows are right-padded and attention is causal, so no real token ever sees padding: no mask is needed.


@torch.no_grad()
def roll_out(actor: LlamaForCausalLM, settings: Settings, generator: torch.Generator) -> Rollouts:
    """Sample one response to each of `rollout_batch` fresh prompts, and judge it."""

    def sample(tokens: Tensor, ends: Tensor) -> Tensor:
        logits = actor(input_ids=tokens, use_cache=False).logits[torch.arange(len(tokens)), ends - 1]
        probabilities = (logits / settings.temperature).softmax(dim=1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    prompts, prompt_lengths = make_prompts(settings.rollout_batch, generator)
    tokens, lengths = write(prompts, prompt_lengths, sample)
    terminated = tokens.gather(1, lengths[:, None] - 1).squeeze(1) == EOS
    scores = judge(tokens, response_mask(tokens, prompt_lengths, lengths))
    return Rollouts(tokens, prompt_lengths, lengths, terminated, scores)


# 5. Score. Log-probs of the tokens that were sampled, under the same temperature.


def token_logprobs(actor: LlamaForCausalLM, tokens: Tensor, temperature: float) -> Tensor:
    """[B, T+1] int64 to [B, T]: log p(token t + 1 | tokens up to t)."""
    logits = actor(input_ids=tokens[:, :-1], use_cache=False).logits.float() / temperature
    return logits.log_softmax(dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


# 6. Estimate. A reward for every token, and from it how much better than expected each token was.


def reward_tokens(rollouts: Rollouts, logprobs: Tensor, ref_logprobs: Tensor, settings: Settings) -> Tensor:
    """-kl_coef (logprob - ref_logprob) on response tokens, plus the score on the last of them: [B, T]."""
    scores = torch.where(rollouts.terminated, rollouts.scores, settings.missing_eos_score)
    rewards = -settings.kl_coef * (logprobs - ref_logprobs) * rollouts.response_mask
    rewards[torch.arange(len(scores)), rollouts.lengths - 2] += scores  # token `lengths - 1` has index `lengths - 2`
    return rewards


def estimate_advantages(
    rollouts: Rollouts, rewards: Tensor, values: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, backwards through every response: (advantages, returns), both [B, T].

    After the last token the value is 0 if the response ended, and the last value seen if it was cut off.
    """
    advantages, mask = torch.zeros_like(values), rollouts.response_mask
    for row in range(len(values)):
        response = mask[row].nonzero().squeeze(1).tolist()
        advantage = torch.zeros(())
        next_value = torch.zeros(()) if rollouts.terminated[row] else values[row, response[-1]]
        for t in reversed(response):
            delta = rewards[row, t] + settings.gamma * next_value - values[row, t]
            advantage = delta + settings.gamma * settings.gae_lambda * advantage
            advantages[row, t], next_value = advantage, values[row, t]
    return advantages, (advantages + values) * mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all response tokens of the batch."""
    chosen = advantages[mask]
    return (advantages - chosen.mean()) * torch.rsqrt(chosen.var(unbiased=False) + 1e-8) * mask


@torch.no_grad()
def estimate(
    actor: LlamaForCausalLM, critic: Critic, ref_logprobs: Tensor, rollouts: Rollouts, settings: Settings
) -> dict[str, Tensor]:
    """Everything the optimiser needs to know about the rollouts: [B, T] each."""
    logprobs = token_logprobs(actor, rollouts.tokens, settings.temperature)
    values = critic(rollouts.tokens[:, :-1])
    rewards = reward_tokens(rollouts, logprobs, ref_logprobs, settings)
    advantages, returns = estimate_advantages(rollouts, rewards, values, settings)
    return {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "values": values,
        "token_level_rewards": rewards,
        "advantages": advantages,
        "whitened_advantages": whiten(advantages, rollouts.response_mask),
        "returns": returns,
    }


# 7. Optimise. Two losses, both means over response tokens; actor and critic share nothing.


def policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """(clipped surrogate, share of tokens where the clip was active)."""
    ratio = (new_logprobs - logprobs)[mask].exp()
    unclipped = -advantages[mask] * ratio
    clipped = -advantages[mask] * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, clipped).mean(), (clipped > unclipped).float().mean()


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Half the worse of two squared errors: of the new value, and of one that may only move by clip_range."""
    moved = torch.minimum(torch.maximum(new_values, values - clip_range), values + clip_range)
    unclipped, clipped = (new_values - returns)[mask] ** 2, (moved - returns)[mask] ** 2
    return 0.5 * torch.maximum(unclipped, clipped).mean()


def make_optimizer(model: nn.Module, lr: float, settings: Settings) -> torch.optim.AdamW:
    """AdamW without weight decay; eps is 1e-5, not torch's 1e-8."""
    betas, eps = settings.adam_betas, settings.adam_eps
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=0.0)


def backward(
    actor: LlamaForCausalLM, critic: Critic, rollouts: Rollouts, experience: dict[str, Tensor], settings: Settings
) -> dict[str, Tensor]:
    """Both losses on these rows; their gradients are left in the models."""
    mask = rollouts.response_mask
    new_logprobs = token_logprobs(actor, rollouts.tokens, settings.temperature)
    loss, clip_fraction = policy_loss(
        new_logprobs, experience["logprobs"], experience["whitened_advantages"], mask, settings.clip_range
    )
    new_values = critic(rollouts.tokens[:, :-1])
    critic_loss = value_loss(new_values, experience["values"], experience["returns"], mask, settings.value_clip_range)
    actor.zero_grad()
    critic.zero_grad()
    loss.backward()
    critic_loss.backward()
    return {"policy_loss": loss.detach(), "value_loss": critic_loss.detach(), "clip_fraction": clip_fraction}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> Tensor:
    """Clip the gradient's global norm, step, and return the norm it had."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    return norm


def ppo_step(
    actor: LlamaForCausalLM, critic: Critic, ref_logprobs: Tensor, rollouts: Rollouts, settings: Settings
) -> dict[str, Tensor]:
    """Exactly one optimiser step of fresh optimisers on all rows at once; changes both models, reports everything.

    Besides the tensors of `estimate` and the losses: "actor_grad_norm", "critic_grad_norm", and for every parameter
    "actor_grad/<name>" (before clipping) and "actor_weight/<name>" (after the step), likewise for the critic.
    """
    experience = estimate(actor, critic, ref_logprobs, rollouts, settings)
    report = {**experience, **backward(actor, critic, rollouts, experience, settings)}
    for role, model, lr in (("actor", actor, settings.actor_lr), ("critic", critic, settings.critic_lr)):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            report[f"{role}_grad/{name}"] = parameter.grad.clone()
        report[f"{role}_grad_norm"] = update(model, make_optimizer(model, lr, settings), settings)
        for name, parameter in model.named_parameters():
            report[f"{role}_weight/{name}"] = parameter.detach().clone()
    return report


# 8. The loop.


def one_iteration(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM, Critic],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    settings: Settings,
    generator: torch.Generator,
) -> dict[str, float]:
    """Roll out, score, estimate, optimise: once."""
    actor, reference, critic = models
    rollouts = roll_out(actor, settings, generator)
    with torch.no_grad():
        ref_logprobs = token_logprobs(reference, rollouts.tokens, settings.temperature)
    experience = estimate(actor, critic, ref_logprobs, rollouts, settings)
    clip_fractions = []
    for _ in range(settings.ppo_epochs):
        for index in torch.randperm(len(rollouts.tokens), generator=generator).split(settings.mini_batch):
            rows = {name: value[index] for name, value in experience.items()}
            losses = backward(actor, critic, rollouts.rows(index), rows, settings)
            update(actor, optimizers[0], settings)
            update(critic, optimizers[1], settings)
            clip_fractions.append(losses["clip_fraction"].item())
    kl = ((experience["logprobs"] - ref_logprobs) * rollouts.response_mask).sum(dim=1)
    return {
        "score": rollouts.scores.mean().item(),
        "stopped": rollouts.terminated.float().mean().item(),
        "length": (rollouts.lengths - rollouts.prompt_lengths).float().mean().item(),
        "kl": kl.mean().item(),
        "clip": sum(clip_fractions) / len(clip_fractions),
        "value_loss": losses["value_loss"].item(),
    }


def train(settings: Settings, *, log_every: int = 5) -> list[dict[str, float]]:
    """Imitate, then improve; one dictionary of metrics per PPO iteration."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    config = tiny_llama()
    actor, reference, critic = LlamaForCausalLM(config), LlamaForCausalLM(config), Critic(config)
    imitate(actor, settings, generator)
    reference.load_state_dict(actor.state_dict())
    optimizers = (
        make_optimizer(actor, settings.actor_lr, settings),
        make_optimizer(critic, settings.critic_lr, settings),
    )
    history = []
    for iteration in range(settings.iterations):
        metrics = one_iteration((actor, reference, critic), optimizers, settings, generator)
        history.append(metrics)
        if log_every and (iteration % log_every == 0 or iteration == settings.iterations - 1):
            print(f"{iteration:3d}  " + "  ".join(f"{name} {value:6.3f}" for name, value in metrics.items()))
    return history


def main() -> None:
    """Train once and say what came of it."""
    start = time.perf_counter()
    history = train(Settings())
    seconds = time.perf_counter() - start
    print(f"score {history[0]['score']:.2f} -> {history[-1]['score']:.2f} in {seconds:.0f} s (1.00 is perfect)")


if __name__ == "__main__":
    main()
