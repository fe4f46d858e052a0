"""Seconds, tokens/s, FLOP/s and peak memory of an iteration's phases, beside transformers on the same work, or TRL.

    python tools/bench_step.py                                  PPO, the default workload, 5 rounds
    python tools/bench_step.py --json step.json                 ... and write everything measured, with what it ran on
    python tools/bench_step.py --algorithm grpo                 GRPO likewise, 9 rounds
    python tools/bench_step.py --algorithm grpo --vs trl        whole GRPO iterations beside TRL's GRPOTrainer

Every round runs each phase and its counterpart once, one after the other, so that a busy machine slows both; the ratio
is that of the medians. Both sides hold the same random Llama and work on the same tokens:

    rollout, rollout_ragged     `generate` with sampling; ragged responses end after uniform 4..N tokens on both sides
    score_*                     a forward without gradients (all logits)
    update_*                    forward, backward (cross entropy of the response tokens) and fused AdamW
    iteration                   1 generate, a forward of every model that is asked (in GRPO the reference alone:
                                old_logprobs=sampler), and forward, backward and AdamW of every learner

Ours do more: the phases include offloading, log-probs, entropy, losses, gradient clipping and metrics.
FLOP/s count the model's: every position once, the vocabulary only where a response token is predicted, backward twice.

Beside TRL (`pip install -e '.[bench]'`) a round is our iteration and its training step with equal lengths, then both
with ragged ones, in one process: the same weights, prompts, lengths, judge, group size, loss, KL in the loss and AdamW,
TRL's generation by transformers. Rollouts, tokens and optimiser steps of both sides are counted, and must be equal. The
settings of both are printed; where TRL has a choice it has what makes it fastest (tools/step_bench/trl_peer.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Its parts are beside it in tools.step_bench.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megarlhf.errors import ConfigError, MegarlhfError
from megarlhf.observe.provenance import machine, versions
from tools.step_bench.measure import measure, results
from tools.step_bench.ours import ALGORITHMS, Ours, build, phases_of
from tools.step_bench.workload import Sizes

ROOT = Path(__file__).resolve().parents[1]
REPEATS = {"ppo": 5, "grpo": 9}
"""Measured rounds by default."""


def beside_transformers(ours: Ours, directory: Path, repeats: int) -> dict[str, Any]:
    """Phase by phase: what is reported."""
    phases, peer = phases_of(ours, directory)
    measure(phases, peer, repeats, ours.mesh.device)
    rows = results(phases, peer, "transformers")
    print("\n".join(table(rows, "transformers")))
    theirs = {name: {"all_seconds": work.seconds, "peak_bytes": work.peak_bytes} for name, work in peer.items()}
    return {"phases": rows, "transformers": theirs}


def beside_trl(ours: Ours, directory: Path, repeats: int) -> dict[str, Any]:
    """Iteration by iteration: what is reported."""
    from tools.step_bench import trl_peer

    turns = trl_peer.beside_trl(ours, directory, repeats)
    phases, peer = trl_peer.peer_of(turns)
    rows = results(phases, peer, "trl")
    settings = {"ours": json.loads(ours.cfg.model_dump_json()), "trl": turns.settings}
    for name, said in {"ours": ours.said, f"TRL {importlib.metadata.version('trl')}": turns.settings}.items():
        print(f"{name}: {' '.join(f'{setting}={value}' for setting, value in said.items())}")
    print("\n".join([*table(rows, "trl"), *trl_peer.shares(turns)]))
    theirs = {name: {"all_seconds": each.seconds, "peak_bytes": each.peak_bytes} for name, each in peer.items()}
    return {
        "phases": rows,
        "trl": theirs,
        "parts": turns.parts,
        "counts": turns.counts,
        "kl": turns.kl,
        "settings": anywhere(settings, directory),
    }


def anywhere(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Settings to be written down: without where this machine keeps the checkout and what was made for the moment."""
    text = json.dumps(settings).replace(str(directory), "DIR").replace(f"{ROOT}/", "")
    return json.loads(text)


def table(rows: Sequence[dict[str, Any]], peer: str) -> list[str]:
    """Lines of text."""
    head = f"{'phase':<16}{'seconds':>9}{'tokens/s':>10}{'GFLOP/s':>9}{'peak MiB':>10}{peer:>14}{'ratio':>7}"
    lines = [
        f"{row['phase']:<16}{row['seconds']:>9.3f}{row['tokens_per_s']:>10.0f}{row['flops_per_s'] / 1e9:>9.0f}"
        f"{row['peak_bytes'] / 2**20:>10.0f}{row[f'{peer}_seconds']:>14.3f}{row['ratio']:>7.2f}"
        for row in rows
    ]
    return [head, *lines]


def about(sizes: Sizes, device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    trl = {"trl": importlib.metadata.version("trl")} if importlib.util.find_spec("trl") else {}
    return {
        "command": shlex.join(["python", "tools/bench_step.py", *arguments]),
        "versions": {**versions(), **trl},
        "machine": machine(device),
        "workload": asdict(sizes),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ppo", help="whose iteration (default ppo)")
    parser.add_argument("--vs", choices=("transformers", "trl"), default="transformers", help="trl: with grpo alone")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--repeats", type=_count, help="measured rounds (default 5, 9 of grpo)")
    parser.add_argument("--threads", type=_count, default=2, help="torch threads of both sides (default 2)")
    defaults = Sizes(256, 4, 8, 4, 1024, 512, 8, 8, 32, 64, 64, 64)
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_count, default=value, help=f"default {value}")
    args = parser.parse_args(arguments)
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads or args.new_tokens < 4:
        parser.error("--hidden must be a multiple of 2 x --heads, --heads of --kv-heads, and --new-tokens at least 4")
    if args.vs == "trl" and args.algorithm != "grpo":
        parser.error(f"--vs trl with --algorithm {args.algorithm}: TRL has GRPO; add --algorithm grpo")
    rows = args.prompts * args.group
    if args.vs == "trl" and rows % min(rows, args.peer_micro_batch):
        parser.error("--prompts x --group must be a multiple of --peer-micro-batch, TRL's per_device_train_batch_size")
    args.repeats = args.repeats or REPEATS[args.algorithm]
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; give a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write."""
    args = parse(arguments)
    sizes = Sizes(**{name: vars(args)[name] for name in Sizes.__dataclass_fields__})
    try:
        if args.vs == "trl" and importlib.util.find_spec("trl") is None:
            raise ConfigError("--vs trl: TRL is not installed; it is in the extra `bench`: pip install -e '.[bench]'")
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory() as directory:
            ours = build(ALGORITHMS[args.algorithm], sizes, Path(directory))
            beside = beside_trl if args.vs == "trl" else beside_transformers
            found = beside(ours, Path(directory), args.repeats)
    except MegarlhfError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if args.json:
        report = {**about(sizes, ours.mesh.device, arguments), **found}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
