"""Our side: the roles of an algorithm, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Anchored, PolicyRows, Prompts, ValueRows
from megarlhf.models.role import TrainableRole
from megarlhf.observe.clock import Clock
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.parallel.micro_batches import Loss
from megarlhf.runs.guard import StepGuard
from megarlhf.trainers import grpo, ppo
from megarlhf.trainers.policy_loop import Cast, Iteration, Turn, optimise
from megarlhf.trainers.trainer import Trainer
from tools.step_bench import workload
from tools.step_bench.measure import Phase, Work
from tools.step_bench.peer import Peer
from tools.step_bench.workload import EOS, PAD, FixedLengths, Sizes, prompts_of, response_lengths


@dataclass(frozen=True)
class Algorithm:
    """Its trainer, its page, and its settings beside those of all."""

    trainer: Trainer[Any, Any, Any]
    page: Callable[[Any, Prompts, Any, Turn], Iteration]
    settings: Callable[[Path], dict[str, Any]]


ALGORITHMS = {
    "ppo": Algorithm(
        ppo.TRAINER,
        ppo.ppo_iteration,
        lambda directory: {
            "reward": {"init": str(directory / "scalar")},
            "tokenizer": "arithmetic",
            "prompts": {"source": "arithmetic", "template": "plain"},
            "ppo_epochs": 1,
        },
    ),
    "grpo": Algorithm(
        grpo.TRAINER,
        grpo.grpo_iteration,
        lambda directory: {
            "judges": {"words": {"kind": "function", "function": f"{workload.__file__}:score"}},
            "tokenizer": str(directory / "tokenizer"),
            "prompts": {"source": str(directory / "prompts.jsonl"), "template": "plain"},
            # As TRL divides; and a step large enough that there is a KL from the second iteration on.
            "group_std": {"eps": 1e-4},
            # As TRL, which takes the policy that learns for the one that drew.
            "old_logprobs": "sampler",
            "actor": {"init": str(directory / "language"), "optim": {"lr": 1e-4, "schedule": "constant"}},
        },
    ),
}


@dataclass(frozen=True)
class Ours:
    """The roles, their settings and what they work on."""

    algorithm: Algorithm
    sizes: Sizes
    cfg: Any
    cast: Cast
    engine: FixedLengths
    prompts: Prompts
    turn: Turn
    lengths: Mapping[str, Tensor]
    """Of responses, by kind."""
    numbers: Iterator[int] = field(default_factory=count)
    """Of iterations: each draws other responses."""

    @property
    def mesh(self) -> Mesh:
        """Where it runs."""
        return self.cast.actor.mesh

    @property
    def said(self) -> dict[str, Any]:
        """Settings of GRPO that another implementation has too."""
        cfg, optim = self.cfg, self.cfg.actor.optim.model_dump()
        names = ("rollout_batch", "global_batch", "micro_batch", "group_size", "epochs", "kl_coef", "kl_in")
        more = ("kl_estimator", "clip_range", "loss_mean", "old_logprobs", "offload")
        said = cfg.model_dump(include={*names, *more})
        chosen = {"policy_loss": cfg.policy_loss_choice.implementation, "dtype": cfg.compute.dtype}
        return {**said, **chosen, **{f"actor.optim.{name}": x for name, x in optim.items()}}

    @property
    def scoring(self) -> list[str]:
        """Names of the models that an iteration asks about its rollouts."""
        without = {self.cast.actor.name} if self.cfg.old_logprobs == "sampler" else set[str]()
        return [role.name for role in self.cast.every if role.name not in without]

    def tokens(self, kind: str) -> int:
        """Of all responses."""
        return int(self.lengths[kind].sum())

    def flops(self, kind: str) -> dict[str, float]:
        """Of a forward pass of each role over the rollouts, by name: all positions, and the vocabulary in responses."""
        inputs = self.sizes.prompt_tokens + self.lengths[kind] - 1
        positions, keys = int(inputs.sum()), int((inputs * (inputs + 1)).sum()) // 2
        projected, spec = {"language": self.tokens(kind), "scalar": 0}, self.cast.actor.spec
        return {role.name: spec.forward_flops(positions, keys, projected[role.head]) for role in self.cast.every}

    def roll_out(self, kind: str) -> Any:
        """Rollouts whose responses end where they should."""
        self.engine.response_lengths = self.lengths[kind]
        rollout = self.engine.generate(self.prompts, self.cfg.sampling, seed=1, group_size=self.sizes.group)
        check_lengths("our", rollout.response_lengths, self.lengths[kind])
        return rollout

    def iterate(self, kind: str) -> Iteration:
        """A whole iteration."""
        self.engine.response_lengths = self.lengths[kind]
        turn = replace(self.turn, number=next(self.numbers))
        return self.algorithm.page(self.cast, self.prompts, self.cfg, turn)

    def iteration(self, name: str, kind: str, counterpart: dict[str, int], run: Callable[[], object]) -> Phase:
        """The phase that `run` is: one generate, a forward of every role asked, one optimiser step of each learner."""
        flops = self.flops(kind)
        passes = [flops[self.cast.actor.name], *(flops[name] for name in self.scoring)]
        passes += [3 * flops[name] for name in self.cast.learners]
        return Phase(run, name, counterpart, self.tokens(kind), sum(passes))


def check_lengths(whose: str, found: Tensor, told: Tensor) -> None:
    """Raise where responses do not end where they should."""
    if found.tolist() != told.tolist():
        raise RuntimeError(f"{whose} rollouts do not end where they should; the model's first token is too likely.")


def build(algorithm: Algorithm, sizes: Sizes, directory: Path) -> Ours:
    """Random models and texts in `directory`, and our roles on them."""
    workload.write_models(sizes, directory)
    workload.write_texts(sizes, directory)
    cfg = algorithm.trainer.config.model_validate(
        {
            "run_dir": directory / "run",
            "actor": {"init": str(directory / "language")},
            "compute": {"dtype": "float32"},
            "sampling": {"temperature": 1.0, "max_new_tokens": sizes.new_tokens},
            "iterations": 1_000_000,
            "rollout_batch": sizes.rows,
            "group_size": sizes.group,
            "global_batch": sizes.rows,
            "micro_batch": sizes.micro_batch,
            **algorithm.settings(directory),
        }
    )
    mesh = start(cfg.layout, seed=1)
    cast, prompts = algorithm.trainer.models(cfg, algorithm.trainer.prepare(cfg), mesh), prompts_of(sizes)
    longest = sizes.prompt_tokens + sizes.new_tokens
    engine = FixedLengths(cast.actor, eos_ids=[EOS], pad_id=PAD, max_sequence_length=longest)
    turn = Turn(0, cfg.seed, Clock(mesh.device), StepGuard(cfg.run_dir, 0, mesh), lambda _: prompts)
    lengths = {kind: of.to(mesh.device) for kind, of in response_lengths(sizes).items()}
    return Ours(algorithm, sizes, cfg, replace(cast, sampler=engine), engine, prompts, turn, lengths)


def phases_of(ours: Ours, directory: Path) -> tuple[list[Phase], dict[str, Work]]:
    """Every phase of an iteration, and transformers' counterparts on the same tokens."""
    cast, cfg, lengths = ours.cast, ours.cfg, ours.lengths
    peer = Peer(directory / "language", ours.sizes, ours.prompts, ours.mesh.device)
    ours.roll_out("ragged")
    rollout = ours.roll_out("equal")
    zeros = torch.zeros_like(rollout.sampler_logprobs)
    given = [
        PolicyRows(rollout, rollout.sampler_logprobs, zeros + 1.0),
        Anchored(rollout, rollout.sampler_logprobs, zeros + 1.0, rollout.sampler_logprobs),
        ValueRows(rollout, zeros, zeros),
    ]
    rows = {type(each): each for each in given}
    positions, flops = rollout.inputs.numel(), ours.flops("equal")

    def generate(name: str, kind: str, theirs: str) -> Phase:
        run = partial(ours.roll_out, kind)
        return Phase(run, name, {theirs: 1}, ours.tokens(kind), ours.flops(kind)[cast.actor.name])

    def update(role: TrainableRole) -> Phase:
        learner = ours.algorithm.trainer.learners[role.name]
        loss: Loss[Any] = learner.loss(role, cfg)
        run = partial(optimise, role, loss, rows[learner.rows], ours.turn, cfg)
        return Phase(run, f"update_{role.name}", {"train": 1}, positions, 3 * flops[role.name])

    passes = {"generate": 1, "forward": len(ours.scoring), "train": len(cast.learners)}
    phases = [
        generate("rollout", "equal", "generate"),
        generate("rollout_ragged", "ragged", "generate_ragged"),
        *(
            Phase(partial(role.score, rollout), f"score_{role.name}", {"forward": 1}, positions, flops[role.name])
            for role in cast.every
        ),
        *(update(role) for role in cast.learners.values()),
        ours.iteration("iteration", "equal", passes, lambda: ours.iterate("equal")),
    ]
    work = {
        "generate": Work(lambda: peer.generate(lengths["equal"])),
        "generate_ragged": Work(lambda: peer.generate(lengths["ragged"])),
        "forward": Work(lambda: peer.forward(rollout.inputs)),
        "train": Work(lambda: peer.train(rollout.inputs, rollout.labels, rollout.response_mask)),
    }
    return phases, work
