"""Seconds, tokens/s, FLOP/s and peak memory of a PPO iteration's phases, beside transformers on the same work.

    python tools/bench_step.py                      the default workload, 5 rounds
    python tools/bench_step.py --json step.json     ... and write everything measured, with machine, versions and commit

Every round runs each phase and its counterpart once, one after the other, so that a busy machine slows both; the ratio
is that of the medians. Both sides hold the same random Llama and work on the same tokens:

    rollout, rollout_ragged     `generate` with sampling; ragged responses end after uniform 4..N tokens on both sides
    score_*                     a forward without gradients (all logits)
    update_*                    forward, backward (cross entropy of the response tokens) and fused AdamW
    iteration                   1 generate + 4 forwards + 2 forward, backward and AdamW

Ours do more: the phases include offloading, log-probs, entropy, losses, gradient clipping and metrics.
FLOP/s count the model's: every position once, the vocabulary only where a response token is predicted, backward twice.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megarlhf.batch.rollouts import PolicyRows, Prompts, ValueRows
from megarlhf.errors import MegarlhfError
from megarlhf.models.role import TrainableRole
from megarlhf.observe.clock import Clock
from megarlhf.observe.memory import forget_peak, peak_resident
from megarlhf.observe.provenance import machine, versions
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.parallel.micro_batches import Loss
from megarlhf.rollout.controller import Ledger
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runs.guard import StepGuard
from megarlhf.trainers.policy_loop import Turn, optimise
from megarlhf.trainers.ppo import TRAINER, PPOCast, PPOConfig, ppo_iteration

EOS = 0
"""The first token: inverse-CDF sampling draws it for a random number of 0."""
SHORTEST = 4
"""Shortest ragged response, in tokens."""


@dataclass(frozen=True)
class Sizes:
    """The workload; micro_batch and peer_micro_batch are rows of one forward pass, ours and transformers'."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    micro_batch: int
    peer_micro_batch: int

    @property
    def rows(self) -> int:
        """Rollouts of an iteration."""
        return self.prompts * self.group


class FixedLengths(RolloutEngine):
    """Draws EOS exactly where told: its random numbers are 0 there, and elsewhere too large for the first token."""

    response_lengths: Tensor

    def _ledger(self, rows: Prompts, streams: Tensor, sampling: SamplingConfig, seed: int) -> Ledger:
        ledger = super()._ledger(rows, streams, sampling, seed)
        draws = ledger.uniforms.clamp(min=0.1)
        last = (rows.lengths + self.response_lengths - 1)[:, None]
        kept = draws.gather(1, last) * (self.response_lengths == sampling.max_new_tokens)[:, None]
        return replace(ledger, uniforms=draws.scatter(1, last, kept))


class Peer:
    """The same model in transformers."""

    def __init__(self, directory: Path, sizes: Sizes, prompts: Prompts, device: torch.device) -> None:
        from transformers import LlamaForCausalLM

        self.sizes, self.prompts = sizes, prompts.tokens.to(device)
        model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def generate(self, response_lengths: Tensor) -> Tensor:
        """Tokens [B, prompt + N], pure sampling; rows end at `response_lengths` [B]."""
        # Rows of full length need no EOS, and then nothing is spent on forcing one.
        ragged = bool((response_lengths < self.sizes.new_tokens).any())
        return self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=self.sizes.group,
            max_new_tokens=self.sizes.new_tokens,
            eos_token_id=EOS if ragged else None,
            pad_token_id=EOS,
            logits_processor=[self._ending(response_lengths)] if ragged else [],
        )

    def _ending(self, response_lengths: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        last = self.sizes.prompt_tokens + response_lengths - 1

        def processor(tokens: Tensor, scores: Tensor) -> Tensor:
            # 1e9 stands for certainty: EOS where the row ends, anything else before.
            scores[:, EOS] = (2.0 * (last == tokens.shape[1]) - 1.0) * 1e9
            return scores

        return processor

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> None:
        """Logits of every position, in micro-batches."""
        for rows in inputs.split(self.sizes.peer_micro_batch):
            self.model(rows, use_cache=False)

    def train(self, inputs: Tensor, labels: Tensor, mask: Tensor) -> None:
        """One AdamW step on the mean cross entropy of the labels in `mask`."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = [x.split(self.sizes.peer_micro_batch) for x in (inputs, labels, mask)]
        for rows, targets, chosen in zip(*parts, strict=True):
            logits = self.model(rows, use_cache=False).logits
            (cross_entropy(logits[chosen], targets[chosen], reduction="sum") / mask.sum()).backward()
        self.optimizer.step()


@dataclass
class Phase:
    """One phase, how often transformers does what for the same work, and the seconds of every round."""

    name: str
    run: Callable[[], object]
    counterpart: dict[str, int]
    tokens: int
    flops: float
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass
class Bench:
    """Both sides, ready to run."""

    phases: list[Phase]
    peer: dict[str, Phase]


def build(sizes: Sizes, directory: Path) -> tuple[Bench, Mesh]:
    """Random models in `directory`, our four roles and transformers' model on it, and everything to time."""
    _write_models(sizes, directory)
    cfg = _config(sizes, directory)
    mesh = start(cfg.layout, seed=1)
    cast, prompts = TRAINER.models(cfg, TRAINER.prepare(cfg), mesh), _prompts(sizes)
    peer = Peer(directory / "language", sizes, prompts, mesh.device)
    actor, longest = cast.actor, sizes.prompt_tokens + sizes.new_tokens
    engine = FixedLengths(actor, eos_ids=[EOS], pad_id=EOS, max_sequence_length=longest)
    return Bench(*_phases(sizes, cfg, replace(cast, sampler=engine), engine, prompts, peer)), mesh


def _phases(
    sizes: Sizes, cfg: PPOConfig, cast: PPOCast, engine: FixedLengths, prompts: Prompts, peer: Peer
) -> tuple[list[Phase], dict[str, Phase]]:
    mesh = cast.actor.mesh
    equal = torch.full((sizes.rows,), sizes.new_tokens, device=mesh.device)
    draws = torch.Generator().manual_seed(3)
    ragged = torch.randint(SHORTEST, sizes.new_tokens + 1, (sizes.rows,), generator=draws).to(mesh.device)
    turn = Turn(0, cfg.seed, Clock(mesh.device), StepGuard(cfg.run_dir, 0, mesh), lambda _: prompts)

    def roll_out(response_lengths: Tensor) -> Any:
        engine.response_lengths = response_lengths
        return engine.generate(prompts, cfg.sampling, seed=1, group_size=sizes.group)

    def iterate() -> object:
        engine.response_lengths = equal
        return ppo_iteration(cast, prompts, cfg, turn)

    rollout = roll_out(equal)
    if not (roll_out(ragged).response_lengths == ragged).all():
        raise RuntimeError("ragged rollouts do not end where they should; the model's first token is too likely.")
    inputs, zeros = rollout.inputs, torch.zeros_like(rollout.sampler_logprobs)
    lessons = PolicyRows(rollout, rollout.sampler_logprobs, zeros + 1.0)
    rows = {"actor": lessons, "critic": ValueRows(rollout, zeros, zeros)}
    responses, short, positions = sizes.rows * sizes.new_tokens, int(ragged.sum()), inputs.numel()
    keys = positions * (inputs.shape[1] + 1) // 2
    forward, body = (cast.actor.spec.forward_flops(positions, keys, projected) for projected in (responses, 0))
    flops = {role: forward if role.head == "language" else body for role in cast.every}
    learning = [(role, TRAINER.learners[role.name].loss(role, cfg)) for role in cast.learners.values()]
    iteration_flops = forward + sum(flops.values()) + 3 * (forward + body)

    def update(role: TrainableRole, loss: Loss) -> Phase:
        run = partial(optimise, role, loss, rows[role.name], turn, cfg)
        return Phase(f"update_{role.name}", run, {"train": 1}, positions, 3 * flops[role])

    phases = [
        Phase("rollout", lambda: roll_out(equal), {"generate": 1}, responses, forward),
        Phase("rollout_ragged", lambda: roll_out(ragged), {"generate_ragged": 1}, short, forward * short / responses),
        *(
            Phase(f"score_{role.name}", partial(role.score, rollout), {"forward": 1}, positions, flops[role])
            for role in cast.every
        ),
        *(update(role, loss) for role, loss in learning),
        Phase("iteration", iterate, {"generate": 1, "forward": 4, "train": 2}, responses, iteration_flops),
    ]
    work = [
        Phase("generate", lambda: peer.generate(equal), {}, responses, forward),
        Phase("generate_ragged", lambda: peer.generate(ragged), {}, short, forward * short / responses),
        Phase("forward", lambda: peer.forward(inputs), {}, positions, forward),
        Phase("train", lambda: peer.train(inputs, rollout.labels, rollout.response_mask), {}, positions, 3 * forward),
    ]
    return phases, {phase.name: phase for phase in work}


def measure(bench: Bench, repeats: int, device: torch.device) -> None:
    """One round to warm up, then `repeats` rounds; each counterpart runs right before the first phase that needs it."""
    order: list[Phase] = []
    for phase in bench.phases:
        order += [bench.peer[name] for name in phase.counterpart if bench.peer[name] not in order] + [phase]
    for phase in order:
        phase.run()
    for _ in range(repeats):
        for phase in order:
            _reset_peak(device)
            started = time.perf_counter()
            phase.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            phase.seconds.append(time.perf_counter() - started)
            phase.peak_bytes = max(phase.peak_bytes, _peak_bytes(device))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        forget_peak()


def _peak_bytes(device: torch.device) -> int:
    """Of this phase: allocated on a GPU, resident in this process on a Linux CPU; 0 elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() if sys.platform == "linux" else 0


def results(bench: Bench) -> list[dict[str, Any]]:
    """One row a phase: medians, rates, peak memory, the counterpart's seconds, and the ratio."""
    rows = []
    for phase in bench.phases:
        median = statistics.median(phase.seconds)
        peers = {name: statistics.median(bench.peer[name].seconds) for name in phase.counterpart}
        theirs = sum(times * peers[name] for name, times in phase.counterpart.items())
        rows.append(
            {
                "phase": phase.name,
                "seconds": median,
                "tokens_per_s": phase.tokens / median,
                "flops_per_s": phase.flops / median,
                "peak_bytes": phase.peak_bytes,
                "counterpart": phase.counterpart,
                "transformers_seconds": theirs,
                "ratio": median / theirs,
                "all_seconds": phase.seconds,
            }
        )
    return rows


def _config(sizes: Sizes, directory: Path) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "run_dir": directory / "run",
            "actor": {"init": str(directory / "language")},
            "reward": {"init": str(directory / "scalar")},
            "tokenizer": "arithmetic",
            "prompts": {"source": "arithmetic", "template": "plain"},
            "compute": {"dtype": "float32"},
            "sampling": {"temperature": 1.0, "max_new_tokens": sizes.new_tokens},
            "iterations": 1_000_000,
            "rollout_batch": sizes.rows,
            "group_size": sizes.group,
            "global_batch": sizes.rows,
            "micro_batch": sizes.micro_batch,
            "ppo_epochs": 1,
        }
    )


def _write_models(sizes: Sizes, directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.ffn,
        vocab_size=sizes.vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=max(256, sizes.prompt_tokens + sizes.new_tokens),
        bos_token_id=None,
        eos_token_id=None,
    )
    config.num_labels = 1
    LlamaForCausalLM(config).save_pretrained(directory / "language")
    LlamaForSequenceClassification(config).save_pretrained(directory / "scalar")


def _prompts(sizes: Sizes) -> Prompts:
    shape = (sizes.prompts, sizes.prompt_tokens)
    tokens = torch.randint(1, sizes.vocab, shape, generator=torch.Generator().manual_seed(2))
    return Prompts(tokens, torch.full(shape[:1], shape[1]), torch.arange(shape[0]), ("",) * shape[0])


def about(sizes: Sizes, device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    return {
        "command": shlex.join(["python", "tools/bench_step.py", *arguments]),
        "versions": versions(),
        "machine": machine(device),
        "workload": asdict(sizes),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--repeats", type=_count, default=5, help="measured rounds (default 5)")
    parser.add_argument("--threads", type=_count, default=2, help="torch threads of both sides (default 2)")
    defaults = Sizes(256, 4, 8, 4, 1024, 512, 8, 8, 32, 64, 64, 64)
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_count, default=value, help=f"default {value}")
    args = parser.parse_args(arguments)
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads or args.new_tokens < 4:
        parser.error("--hidden must be a multiple of 2 x --heads, --heads of --kv-heads, and --new-tokens at least 4")
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; give a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write."""
    args = parse(arguments)
    sizes = Sizes(**{name: vars(args)[name] for name in Sizes.__dataclass_fields__})
    torch.set_num_threads(args.threads)
    try:
        with tempfile.TemporaryDirectory() as directory:
            bench, mesh = build(sizes, Path(directory))
            measure(bench, args.repeats, mesh.device)
    except MegarlhfError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    rows = results(bench)
    print(f"{'phase':<16}{'seconds':>9}{'tokens/s':>10}{'GFLOP/s':>9}{'peak MiB':>10}{'transformers':>14}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['phase']:<16}{row['seconds']:>9.3f}{row['tokens_per_s']:>10.0f}{row['flops_per_s'] / 1e9:>9.0f}"
            f"{row['peak_bytes'] / 2**20:>10.0f}{row['transformers_seconds']:>14.3f}{row['ratio']:>7.2f}"
        )
    if args.json:
        peers = {name: {"all_seconds": p.seconds, "peak_bytes": p.peak_bytes} for name, p in bench.peer.items()}
        report = {**about(sizes, mesh.device, arguments), "phases": rows, "transformers": peers}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
