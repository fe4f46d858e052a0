"""TRL's GRPOTrainer, whose own training loop takes turns with our iterations.

Its steps are timed from `on_step_begin` to `on_step_end`: it tokenises, generates, scores, learns and steps in between,
and fetches prompts and logs outside. Of its settings those that make it fastest here: no gradient checkpointing, no
forward for the log-probs of the policy that sampled, which it takes for those of the policy that learns.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from megarlhf.errors import ConfigError
from tools.step_bench import workload
from tools.step_bench.measure import Phase, Timing
from tools.step_bench.ours import Ours, check_lengths
from tools.step_bench.peer import ending

trl: Any = importlib.import_module("trl")

KINDS = {"equal": "", "ragged": "_ragged"}
"""Of response lengths, in the order of a round, and how names of what has them end."""
PHASES = ("rollout", "score", "estimate", "optimise")
"""Of our clock."""


class Trainer(trl.GRPOTrainer):
    """TRL's, which tells nobody of being measured."""

    def _send_telemetry(self) -> None:
        pass


class Turns(TrainerCallback):
    """Before each of TRL's steps our iteration of the same kind is taken; and both are held to the same work."""

    def __init__(self, ours: Ours, directory: Path, rounds: int) -> None:
        self.ours, self.device = ours, ours.mesh.device
        self.phases = {
            kind: ours.iteration(f"iteration{suffix}", kind, {f"step{suffix}": 1}, self._iterate)
            for kind, suffix in KINDS.items()
        }
        self.steps = {kind: Timing() for kind in KINDS}
        self.parts: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
        """Seconds of our phases and of its `generate`, by kind and name."""
        self.counts = {f"{side}_{what}": 0 for side in ("our", "trl") for what in ("rollouts", "tokens", "steps")}
        self.kl = {"ours": 0.0, "trl": 0.0}
        """To the reference, of the last iteration, in nats: k3 a token."""
        self.kind, self.counting = "equal", False
        self.settings = settings_of(ours, directory, rounds * len(KINDS))
        self.trainer = self._trainer(directory, rounds * len(KINDS))

    def _trainer(self, directory: Path, steps: int) -> Any:
        texts = workload.write_texts(self.ours.sizes, directory)
        trainer = Trainer(
            model=str(directory / "language"),
            reward_funcs=self._judge,
            args=trl.GRPOConfig(**self.settings),
            train_dataset=Dataset.from_dict({"prompt": texts * steps}),
            processing_class=AutoTokenizer.from_pretrained(directory / "tokenizer"),
            callbacks=[self],
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.accelerator.distributed_type.value != "NO":
            raise ConfigError("TRL found several processes, and would be slower; start this as one, without torchrun.")
        self._generate = trainer.model.generate
        trainer.model.generate = self._generate_to_length
        return trainer

    def _generate_to_length(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's call, with responses that end where they should: EOS, but at the limit, where they are cut."""
        lengths, sizes = self.ours.lengths[self.kind], self.ours.sizes
        last = (sizes.prompt_tokens + lengths - 1).masked_fill(lengths == sizes.new_tokens, -1)
        begun = time.perf_counter()
        tokens = self._generate(*args, logits_processor=[ending(last)], **kwargs)
        self._part("generate", time.perf_counter() - begun)
        return tokens

    def _judge(self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        check_lengths("TRL's", lengths, self.ours.lengths[self.kind])
        self._count("trl", rollouts=len(lengths), tokens=int(lengths.sum()))
        return [workload.score("", text, "", {}) for text in completions]

    def _iterate(self) -> None:
        ours, clock = self.ours, self.ours.turn.clock
        before = ours.cast.actor.schedule.num_steps
        done = ours.iterate(self.kind)
        for name in PHASES:
            self._part(name, clock.seconds(name))
        clock.metrics()  # starts it afresh
        check_lengths("our", done.rollout.response_lengths, ours.lengths[self.kind])
        tokens = int(done.rollout.response_mask.sum())
        self._count("our", rollouts=len(done.rollout), tokens=tokens, steps=ours.cast.actor.schedule.num_steps - before)
        self.kl["ours"] = done.metrics["kl/reference_k3_mean"] * len(done.rollout) / tokens

    def _count(self, side: str, **more: int) -> None:
        for what, count in more.items():
            self.counts[f"{side}_{what}"] += count

    def _part(self, name: str, seconds: float) -> None:
        if self.counting:
            self.parts[self.kind].setdefault(name, []).append(seconds)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Our turn, then TRL's."""
        self.kind = list(KINDS)[state.global_step % len(KINDS)]
        self.counting = state.global_step >= len(KINDS)
        self.phases[self.kind].take(self.device, counts=self.counting)
        self.steps[self.kind].begin(self.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Its optimiser did a step."""
        self._count("trl", steps=1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """TRL is done."""
        self.steps[self.kind].end(self.device, counts=self.counting)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """What TRL says of the KL."""
        self.kl["trl"] = (logs or {}).get("kl", self.kl["trl"])


def settings_of(ours: Ours, directory: Path, steps: int) -> dict[str, Any]:
    """TRL's GRPOConfig: what ours says, where both have it."""
    cfg, sizes, optim = ours.cfg, ours.sizes, ours.cfg.actor.optim
    rows = min(sizes.peer_micro_batch, sizes.rows)
    return {
        "output_dir": str(directory / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": sizes.rows // rows,
        "num_generations": sizes.group,
        "max_completion_length": sizes.new_tokens,
        "num_iterations": cfg.epochs,
        "beta": cfg.kl_coef,
        "use_bias_correction_kl": True,
        "epsilon": cfg.clip_range,
        "loss_type": "dapo",
        "temperature": cfg.sampling.temperature,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "use_vllm": False,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": ours.mesh.device.type == "cpu",
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def beside_trl(ours: Ours, directory: Path, repeats: int) -> Turns:
    """One round to warm up, then `repeats`: ours and TRL with equal lengths, ours and TRL with ragged ones.

    Raises:   RuntimeError where both did not do the same work.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    turns = Turns(ours, directory, 1 + repeats)
    turns.trainer.train()
    for what in ("rollouts", "tokens", "steps"):
        mine, theirs = turns.counts[f"our_{what}"], turns.counts[f"trl_{what}"]
        if mine != theirs:
            raise RuntimeError(f"our {what} are {mine:,} and TRL's {theirs:,}: that is not the same work.")
    if turns.counts["trl_steps"] != len(KINDS) * (1 + repeats):
        raise RuntimeError(f"{turns.counts['trl_steps']} optimiser steps; it should be one an iteration.")
    if min(turns.kl.values()) <= 0:
        raise RuntimeError(f"a KL was not computed: {turns.kl}.")
    return turns


def shares(turns: Turns) -> list[str]:
    """Lines on where the medians go: our clock's phases, and TRL's generation."""
    lines: list[str] = []
    for kind, parts in turns.parts.items():
        medians = {name: statistics.median(seconds) for name, seconds in parts.items()}
        mine = ", ".join(f"{name} {medians[name]:.3f}" for name in PHASES)
        rest = statistics.median(turns.steps[kind].seconds) - medians["generate"]
        lines.append(f"{kind}: ours {mine}; TRL generate {medians['generate']:.3f}, the rest {rest:.3f}")
    return lines


def peer_of(turns: Turns) -> tuple[list[Phase], dict[str, Timing]]:
    """Ours, and TRL's steps by the names that ours call them."""
    return list(turns.phases.values()), {f"step{suffix}": turns.steps[kind] for kind, suffix in KINDS.items()}
