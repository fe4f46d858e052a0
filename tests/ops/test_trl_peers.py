"""TRL's own trainers and examples/01_grpo_by_hand.py agree on advantages, log-probs, losses and gradients.

The rows, their scores and the weights of three policies are given: the reference, the one that rolled out, and the one
that is being updated. Everything else is computed by either side, by TRL through its published trainers and settings.

Not compared, for they differ by intention: TRL's RLOO has the ratio of the whole response, so it is held against ours
where that is 1; its k3 has no weight unless `use_bias_correction_kl`, and GSPO's weight where it has GSPO's ratio; its
sampler's correction by sequences is of the product, not the geometric mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.helpers.by_hand import load_by_hand

trl: Any = pytest.importorskip("trl", reason="TRL is not installed; it is in the set `bench`")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"holds for TRL 1.16, not {trl.__version__}", allow_module_level=True)

by_hand = load_by_hand("01_grpo_by_hand")

GROUP, ROWS = 4, 32
PINNED = by_hand.Settings(group_size=GROUP, rollout_batch=ROWS, temperature=0.7, std_eps=1e-4, kl_coef=0.0)
"""std_eps is TRL's; its standard deviation, like ours, divides by GROUP - 1."""
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Given:
    """What both sides are told. Every directory holds one policy."""

    folder: Path
    rollouts: Any
    ref_logprobs: Tensor

    def policy(self, name: str) -> Any:
        return by_hand.LlamaForCausalLM.from_pretrained(self.folder / name)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder: Path = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    policy = by_hand.LlamaForCausalLM(by_hand.tiny_llama())
    with torch.no_grad():
        policy.lm_head.weight.mul_(5)
        for name in ("reference", "old", "new"):
            policy.save_pretrained(folder / name)
            for weight in policy.parameters():
                weight.add_(0.1 * weight.std() * torch.randn(weight.shape))
    given = Given(folder, None, torch.empty(0))
    rollouts = by_hand.roll_out(given.policy("old"), PINNED, torch.Generator().manual_seed(0))
    scores = torch.randn(ROWS).view(-1, GROUP)
    scores[-1] = 0.1  # a group of equal scores
    noise = 0.3 * torch.randn(rollouts.sampler_logprobs.shape) * rollouts.response_mask
    rollouts = replace(
        rollouts,
        scores=scores.flatten(),
        terminated=torch.ones(ROWS, dtype=torch.bool),  # TRL has no other score for those that never stopped
        sampler_logprobs=rollouts.sampler_logprobs + noise,
    )
    with torch.no_grad():
        ref_logprobs = by_hand.token_logprobs(given.policy("reference"), rollouts.tokens, PINNED.temperature)
    return replace(given, rollouts=rollouts, ref_logprobs=ref_logprobs)


def rows_of(given: Given) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Prompts, responses, and the sampler's log-probs of these, as lists without padding."""
    rolled, prompts, responses, logprobs = given.rollouts, [], [], []
    for row, (start, end) in enumerate(zip(rolled.prompt_lengths.tolist(), rolled.lengths.tolist(), strict=True)):
        prompts.append(rolled.tokens[row, :start].tolist())
        responses.append(rolled.tokens[row, start:end].tolist())
        logprobs.append(rolled.sampler_logprobs[row, start - 1 : end - 1].tolist())
    return prompts, responses, logprobs


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*map(str, range(10)), "<eos>", "<pad>", "<bos>"]
    made = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


class GivenRLOO(trl.RLOOTrainer):
    """TRL's RLOO takes no rollouts from outside: these are given where it would sample."""

    given: Given

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, None, dict[str, Any]]:
        return rows_of(self.given)[0], None, {}

    def _generate_single_turn(self, *prompts: Any) -> Any:
        return rows_of(self.given)[1]


def trainer_of(given: Given, kind: str, chosen: dict[str, Any]) -> Any:
    """TRL's trainer on the reference, whose weights are then those of the policy that rolled out."""
    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[kind](
        output_dir=str(given.folder / "out"),
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        steps_per_generation=1,
        num_iterations=2,  # with 1, TRL leaves out the log-probs of the old policy
        max_completion_length=by_hand.MAX_NEW,
        temperature=PINNED.temperature,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **chosen,
    )
    common: dict[str, Any] = {
        "model": str(given.folder / "reference"),
        "reward_funcs": lambda completions, **_: given.rollouts.scores.tolist(),
        "args": config,
        "train_dataset": Dataset.from_dict({"prompt": ["0"] * ROWS}),
        "processing_class": tokenizer(),
    }
    if kind == "rloo":
        trainer = GivenRLOO(**common)
        trainer.given = given
    else:
        names = ("prompt_ids", "completion_ids", "logprobs")
        trainer = trl.GRPOTrainer(
            **common, rollout_func=lambda prompts, _: dict(zip(names, rows_of(given), strict=True))
        )
    trainer.current_gradient_accumulation_steps = 1  # set by its training loop
    trainer.model.load_state_dict(given.policy("old").state_dict())
    return trainer


def theirs_of(trainer: Any, update: Any) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """What TRL makes of the rows, its loss of the policy `update` on them, and the loss's gradients."""
    inputs = trainer._generate_and_score_completions([{"prompt": "0"}] * ROWS)
    trainer.model.load_state_dict(update.state_dict())
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return inputs, loss.detach(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


def ours_of(given: Given, update: Any, settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Likewise: (experience, losses); the gradients are left in `update`."""
    experience = by_hand.estimate(given.policy("old"), given.ref_logprobs, given.rollouts, settings)
    return experience, by_hand.backward(update, given.rollouts.tokens, experience, settings)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def same_gradients(update: Any, theirs: dict[str, Tensor]) -> None:
    """To the tolerance of the largest gradient of all."""
    size = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, weight in update.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name], rtol=0, atol=TOLERANCE * max(1.0, size), msg=name)


KL = {"beta": 0.1, "use_bias_correction_kl": True}
"""k3 times the ratio, with gradient through both"""
OURS_KL = {"kl_coef": 0.1, "kl_estimator": "k3", "kl_place": "loss"}
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
OURS_GSPO = {"ratio": "sequence", "loss_mean": "sequence"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo", **KL}, {"loss_mean": "sequence", **OURS_KL}),
    "bnpo": ({"loss_type": "bnpo", **KL}, {"loss_mean": "token", **OURS_KL}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_high": 0.28}),
    "dapo with kl": ({"loss_type": "dapo", **KL}, {"loss_mean": "token", **OURS_KL}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_mean": "constant", "advantage": "dr_grpo"},
    ),
    "dr_grpo with kl": ({"loss_type": "dr_grpo", **KL}, {"loss_mean": "constant", **OURS_KL}),
    "dual clip": ({"loss_type": "grpo", "delta": 1.4}, {"loss_mean": "sequence", "dual_clip": 1.4}),
    "gspo": ({**GSPO, "epsilon": 3e-4, "epsilon_high": 4e-4}, {**OURS_GSPO, "clip_low": 3e-4, "clip_high": 4e-4}),
    "gspo, wide": ({**GSPO, "epsilon": 0.1}, {**OURS_GSPO, "clip_low": 0.1, "clip_high": 0.1}),
    # TRL's bound is the weight itself, and there is none below.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.28},
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.28},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_grpo_and_relatives(given: Given, name: str) -> None:
    theirs, ours = CASES[name]
    settings, update = replace(PINNED, **ours), given.policy("new")
    experience, losses = ours_of(given, update, settings)
    inputs, loss, gradients = theirs_of(trainer_of(given, "grpo", {"beta": 0.0, **theirs}), given.policy("new"))
    mask = given.rollouts.response_mask
    at = inputs["completion_mask"].bool()
    same(experience["advantages"][mask], inputs["advantages"][:, None].expand(at.shape)[at])
    same(experience["logprobs"][mask], inputs["old_per_token_logps"][at])
    if "beta" in theirs:
        same(given.ref_logprobs[mask], inputs["ref_per_token_logps"][at])
    same(losses["loss"], loss)
    same_gradients(update, gradients)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"mode": "token_truncate", "clip_max": 1.2}, {"correction": "truncate", "correction_high": 1.2}),
        (
            {"mode": "token_mask", "clip_min": 0.8, "clip_max": 1.2},
            {"correction": "mask", "correction_low": 0.8, "correction_high": 1.2},
        ),
    ],
    ids=["truncate", "mask"],
)
def test_correction_of_another_sampler(given: Given, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    chosen = {f"vllm_importance_sampling_{name}": value for name, value in theirs.items()}
    trainer = trainer_of(given, "grpo", {"loss_type": "dapo", "beta": 0.0, **chosen})
    trainer.use_vllm, trainer._last_loaded_step = True, 0  # the correction alone: no engine is ever asked
    settings, update = replace(PINNED, **ours), given.policy("new")
    experience, losses = ours_of(given, update, settings)
    inputs, loss, gradients = theirs_of(trainer, given.policy("new"))
    at = inputs["completion_mask"].bool()
    same(experience["sampler_weights"][given.rollouts.response_mask], inputs["importance_sampling_ratio"][at])
    same(losses["loss"], loss)
    same_gradients(update, gradients)


def test_rloo_before_its_ratio_moves(given: Given) -> None:
    """k1 in the reward; its loss is the mean over rows of a sum over tokens."""
    settings = replace(PINNED, advantage="rloo", kl_place="reward", kl_estimator="k1", kl_coef=0.1)
    settings = replace(settings, loss_mean="constant", max_response=1)
    update = given.policy("old")
    experience, _ = ours_of(given, update, settings)
    inputs, _, gradients = theirs_of(trainer_of(given, "rloo", {"beta": 0.1}), given.policy("old"))
    mask = given.rollouts.response_mask
    same(experience["advantages"].sum(dim=1) / mask.sum(dim=1), inputs["advantages"])
    same((experience["logprobs"] * mask).sum(dim=1), inputs["old_logps"])
    same_gradients(update, gradients)


def test_the_rows_are_not_trivial(given: Given) -> None:
    """Ratios on both sides of every bound, sampler weights likewise, a KL, and responses of several lengths."""
    rolled, mask = given.rollouts, given.rollouts.response_mask
    assert len(rolled.lengths.unique()) > 3
    with torch.no_grad():
        old, new = (by_hand.token_logprobs(given.policy(name), rolled.tokens, 0.7) for name in ("old", "new"))
    ratio, weights = (new - old)[mask].exp(), (old - rolled.sampler_logprobs)[mask].exp()
    for share in (ratio < 0.8, ratio > 1.28, ratio > 1.4, weights < 0.8, weights > 1.2):
        assert 0.02 < share.float().mean() < 0.5
    rows = by_hand.importance_ratio(new, old, mask, "sequence")[:, 0]
    assert (rows < 0.9).any() or (rows > 1.1).any()
    assert ((rows > 0.9) & (rows < 1.1)).any()
    assert (old - given.ref_logprobs)[mask].abs().max() > 0.5
