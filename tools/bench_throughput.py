"""Throughput of a run file's iterations, with random weights and made-up rows: by phase, in any layout.

    python tools/bench_throughput.py ppo --config examples/ppo_tiny.yaml actor.init=tiny-s reward.init=tiny-s
    torchrun --nproc-per-node 8 tools/bench_throughput.py ppo --config examples/llama3_8b_ppo.yaml \
        actor.init=llama3-8b reward.init=llama3-8b --prompts uniform:64:512 --responses lognormal:300:0.8
    python tools/bench_throughput.py sft --config examples/sft_tiny.yaml --prompts fixed:32

Settings are the run file's, with those behind it on the command line. Left out is what is no iteration: states,
measuring, gates, logs of samples. The models must be named: a preset is drawn at random. Every iteration is a whole one
of the trainer's own, of one that draws nothing an optimiser step; the first --warmup are not counted. Prompts are
random words, and so are demonstrations, pairs, judged responses and judged steps. A response ends where --responses
says, so that the work is the same in every layout and with all weights. The run's directory, with the model at its
end, is a temporary one (TMPDIR says where).

A phase's tokens are what it draws, scores or learns from; the iteration's are those that were drawn, or learnt from
where none are. FLOP/s are the model's, of one GPU, and MFU is their share of its dense BF16 peak, whatever the number
format: the convention is printed. --json writes everything, with versions, machine and settings;
tools/compare_bench.py compares two such files.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Its parts are beside it in tools.throughput_bench.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megarlhf.errors import MegarlhfError
from megarlhf.observe.provenance import machine, versions
from megarlhf.observe.work import CONVENTION
from megarlhf.observe.writers import read_metrics
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.command import on_ranks
from megarlhf.trainers.find import trainer_named
from megarlhf.trainers.trainer import Trainer
from tools.throughput_bench.kinds import Kind, moving
from tools.throughput_bench.lengths import Lengths
from tools.throughput_bench.measure import moved, phases, planned
from tools.throughput_bench.published import anchors_of
from tools.throughput_bench.workload import drawn_lengths, ending_where_told, first_spec, measured_settings, write_rows

GIB = 2**30


def bench(args: argparse.Namespace, arguments: Sequence[str], folder: Path) -> int:
    """Run it on the ranks of its layout; the exit code."""
    trainer, iterations = trainer_named(args.trainer), args.warmup + args.iterations
    cfg, kind = measured_settings(trainer, args.config, args.settings, folder, iterations)
    spec = first_spec(cfg, kind)
    write_rows(folder, kind, spec.vocab_size, iterations, args.prompts, args.responses)
    drawn = drawn_lengths(cfg, args.responses)

    def work(cfg: RunConfig, inputs: Any, mesh: Mesh) -> None:
        found = measured(trainer, cfg, inputs, mesh, args, drawn)
        if mesh.is_main:
            report = {**about(cfg, kind, mesh, args, arguments), **found}
            sys.stdout.write("\n".join([*lines(report), ""]))
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    return on_ranks(cfg, arguments, trainer.prepare, work)


def measured(
    trainer: Trainer[Any, Any, Any],
    cfg: RunConfig,
    inputs: Any,
    mesh: Mesh,
    args: argparse.Namespace,
    drawn: Lengths | None,
) -> dict[str, Any]:
    """Every iteration of the run, then every role to the host and back. Collective; complete on rank 0."""
    models = trainer.models(cfg, inputs, mesh)
    if drawn is not None:
        models = ending_where_told(models, drawn)
    trainer.train(cfg, inputs, models, ["bench_throughput"], mesh)
    moves = [moved(role, args.iterations) for role in moving(models)] if cfg.offload == "host" else []
    logged = read_metrics(cfg.run_dir).rows if mesh.is_main else []
    rows = [row for row in logged if row["step"] > args.warmup and "time/iteration_s" in row]
    if not rows:
        return {}
    plan = planned(trainer.workload(cfg), cfg, mesh)
    largest = max(role.spec.parameters for role in models.learners.values())
    return {
        "phases": phases(rows, mesh.layout.world_size),
        "offload": moves,
        "refit": [{name: value for name, value in row.items() if name.startswith("refit/")} for row in rows],
        "peak_bytes": max(row["memory/peak_bytes"] for row in rows),
        "planned_peak": {"phase": plan.phase, "role": plan.role, "bytes": plan.total},
        "published": [each._asdict() for each in anchors_of(largest)],
    }


def about(cfg: RunConfig, kind: Kind, mesh: Mesh, args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    settings = json.loads(cfg.model_dump_json())
    for name in ("run_dir", "tokenizer"):
        del settings[name]  # of this moment alone
    for name in kind.sets:
        del settings[name]["source"]
    return {
        "command": shlex.join(["python", "tools/bench_throughput.py", *arguments]),
        "versions": versions(),
        "machine": machine(mesh.device),
        "ranks": mesh.layout.world_size,
        "prompts": args.prompts,
        "responses": args.responses or "all that there is room for",
        "iterations": args.iterations,
        "convention": CONVENTION,
        "settings": settings,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    head = f"{'phase':<12}{'seconds':>9}{'tokens/s':>12}{'/GPU':>10}{'TFLOP/s/GPU':>13}{'MFU %':>7}"
    said = [f"{report['ranks']} ranks, medians of {report['iterations']} iterations", head]
    for row in report["phases"]:
        rates = [row.get(name) for name in ("tokens_per_s", "tokens_per_s_per_gpu")]
        flops, mfu = row.get("flops_per_s"), row.get("mfu")
        numbers = [f"{rate:,.0f}" if rate is not None else "-" for rate in rates]
        said.append(
            f"{row['phase']:<12}{row['seconds']:>9.3f}{numbers[0]:>12}{numbers[1]:>10}"
            f"{f'{flops / 1e12:.3g}' if flops else '-':>13}{f'{100 * mfu:.1f}' if mfu else '-':>7}"
        )
    said += [
        f"{each['role']}: {each['bytes'] / GIB:.3g} GiB a rank, to the host in {each['to_host_s']:.3g} s "
        f"({each['to_host_gb_per_s']:.1f} GB/s), back in {each['to_device_s']:.3g} s "
        f"({each['to_device_gb_per_s']:.1f} GB/s)"
        for each in report["offload"]
    ]
    plan, measured_on = report["planned_peak"], report["machine"]["device"]
    beside = f"; planned {plan['bytes'] / GIB:.3g} GiB in {plan['phase']} {plan['role']}"
    said += [f"peak memory of rank 0 on {measured_on}: {report['peak_bytes'] / GIB:.3g} GiB{beside}"]
    said += [f"FLOPs: {report['convention']}"]
    said += [
        f"published, not measured here: {each['parameters']} {each['what']}, {each['precision']}, {each['gpus']} H100: "
        f"{each['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU ({each['source']})"
        for each in report["published"]
    ]
    return said


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trainer", help="whose iterations: ppo, grpo, sft, dpo, reward, ...")
    parser.add_argument("settings", nargs="*", help="name=value, over the run file's")
    parser.add_argument("--config", "-c", type=Path, help="the run file")
    parser.add_argument(
        "--prompts", default="uniform:16:64", help="lengths: fixed:N, uniform:A:B, lognormal:MEDIAN:SIGMA"
    )
    parser.add_argument("--responses", help="likewise, EOS in (default: all that there is room for)")
    parser.add_argument("--iterations", type=_count, default=5, help="that are measured (default 5)")
    parser.add_argument("--warmup", type=_count, default=1, help="before them (default 1)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_intermixed_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; give a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write."""
    args = parse(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return bench(args, arguments, Path(folder))
    except MegarlhfError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
