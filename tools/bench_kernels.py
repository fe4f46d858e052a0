"""Seconds, rates, errors and memory of every kernel, beside torch and every installed peer, in one process.

    python tools/bench_kernels.py                           the workload of this machine's kind, 5 repeats
    python tools/bench_kernels.py --json kernels.json       ... and write everything measured
    python tools/bench_kernels.py --only linear_ppo full_kl ... of these kernels alone

Peers: liger-kernel, cut-cross-entropy, quack-kernels (`pip install -e '.[bench]'`) and flash-attn (docs/install.md).

First the ceilings: a large matrix product of random numbers, and a copy, the fastest of 20. Then, for every kernel, all
providers are compared with the definition in fp64, with random upstream gradients; one that is wrong is not timed. Then
they run in turns, on a GPU on copies of the inputs so many that none is in its cache; the median counts. Memory is
measured in one more run, which is not timed.

    rate    TFLOP/s of the matrix products that cannot be saved (2TVH forward, 6TVH with backward: who computes logits
            twice gets no credit), or GB/s of inputs read once and outputs written once
    %       of the measured matrix product or copy
    error   largest error of any output or gradient, relative to its largest element
    MiB     allocated (GPU) or resident (Linux CPU) at the peak, beyond the inputs
    ratio   of the seconds to those of the fastest peer with a gradient or loss term of its own for every token
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Its parts are beside it in tools.kernel_bench.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megarlhf.observe.provenance import machine, versions
from tools.kernel_bench.base import PRESETS, Case, Maker, Sizes
from tools.kernel_bench.measure import Measured, ceilings, measure, tolerance
from tools.kernel_bench.peers import PEERS, with_peers
from tools.kernel_bench.rollouts import (
    paged_decode_cases,
    paged_prefill_cases,
    policy_value_loss_cases,
    rewards_gae_cases,
)
from tools.kernel_bench.vocabulary import (
    full_kl_cases,
    linear_logprob_cases,
    linear_ppo_cases,
    token_logprob_cases,
)

KERNELS: dict[str, Callable[[Maker], Iterator[Case]]] = {
    "token_logprob": token_logprob_cases,
    "linear_logprob": linear_logprob_cases,
    "linear_ppo": linear_ppo_cases,
    "full_kl": full_kl_cases,
    "rewards_gae": rewards_gae_cases,
    "policy_value_loss": policy_value_loss_cases,
    "paged_decode": paged_decode_cases,
    "paged_prefill": paged_prefill_cases,
}


def bench(maker: Maker, kernels: Sequence[str], repeats: int) -> dict[str, Any]:
    """Everything measured: ceilings, a report a case, and the peers that are missing with the reason."""
    limits = ceilings(maker.sizes, maker.device)
    print(f"ceilings: matmul {limits['matmul'] / 1e12:.3g} TFLOP/s, copy {limits['copy'] / 1e9:.3g} GB/s", flush=True)
    missing: dict[str, str] = {}
    reports = []
    for kernel in kernels:
        for case in KERNELS[kernel](maker):
            measured = measure(case, with_peers(case, maker.device, missing), maker, repeats)
            reports.append(report(case, measured, limits[case.bound]))
            print("\n".join(table(reports[-1])), flush=True)
    for reason in sorted(set(missing.values())):
        print(f"missing: {', '.join(name for name, its in missing.items() if its == reason)} ({reason})")
    return {"ceilings": limits, "cases": reports, "missing": missing}


def report(case: Case, measured: list[Measured], ceiling: float) -> dict[str, Any]:
    """One case: medians, rates, and ratios to the best peer, which takes gradients or has a loss term a token."""
    medians = {one.provider.name: statistics.median(one.seconds) for one in measured if one.usable and one.seconds}
    peaks = {one.provider.name: one.peak_bytes for one in measured}
    peers = [one.provider.name for one in measured if one.provider.is_peer and one.provider.name in medians]
    best = min(peers, key=medians.__getitem__, default=None)
    rows = []
    for one in measured:
        provider, median = one.provider, medians.get(one.provider.name)
        theirs, peak = peaks[best] if best else None, one.peak_bytes
        rows.append(
            {
                "provider": provider.name,
                "implementation": provider.implementation,
                "lacks": provider.lacks,
                "is_peer": provider.is_peer,
                "status": "failed" if one.failure else "wrong" if one.wrong else "right",
                "failure": one.failure,
                "errors": {name: found._asdict() for name, found in one.errors.items()},
                "max_error": max((found.relative for found in one.errors.values()), default=None),
                "seconds": median,
                "per_s": median and case.work / median,
                "share_of_ceiling": median and case.work / median / ceiling,
                "peak_bytes": peak,
                "ratio": median / medians[best] if median and best else None,
                "peak_ratio": peak / theirs if peak is not None and theirs else None,
                "all_seconds": one.seconds,
            }
        )
    about = {"kernel": case.kernel, "passes": case.passes, "shape": case.shape, "bound": case.bound, "work": case.work}
    return {**about, "tolerance": tolerance(case), "best_peer": best, "providers": rows}


def table(case: dict[str, Any]) -> list[str]:
    """Lines of text: a heading, and one for each provider."""
    unit, scale = ("TFLOP/s", 1e12) if case["bound"] == "matmul" else ("GB/s", 1e9)
    title = f"{case['kernel']} {case['passes']}, {case['shape']}"
    lines = ["", title, f"  {'provider':<18}{'ms':>10}{unit:>9}{'%':>6}{'error':>9}{'MiB':>8}{'ratio':>7}"]
    for row in case["providers"]:
        error = "" if row["max_error"] is None else f"{row['max_error']:.1e}"
        if row["status"] != "right":
            why = row["failure"] or f"error {error}, more than {case['tolerance']:g}"
            lines.append(f"  {row['provider']:<18}{row['status'].upper()}: {why}")
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        best = "best peer" if row["provider"] == case["best_peer"] else ""
        notes = ", ".join(filter(None, (row["lacks"], best)))
        lines.append(
            f"  {row['provider']:<18}{row['seconds'] * 1e3:>10.3f}{row['per_s'] / scale:>9.3g}"
            f"{100 * row['share_of_ceiling']:>6.1f}{error:>9}{peak:>8}{ratio:>7}  {notes}".rstrip()
        )
    return lines


def about(sizes: Sizes, device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    return {
        "command": shlex.join(["python", "tools/bench_kernels.py", *arguments]),
        "versions": {**versions(), **{package: _version(package) for package in ("triton", *_peer_packages())}},
        "machine": machine(device),
        "workload": asdict(sizes),
    }


def _peer_packages() -> list[str]:
    return sorted({peer.package for peer in PEERS})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS), help="kernels; all without it")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each provider, at least 5 (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU (default 2)")
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=PRESETS, default=kind, help=f"sizes (default here: {kind})")
    options = parser.parse_args(arguments)
    if options.repeats < 5:
        parser.error(f"--repeats {options.repeats}: must be at least 5.")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = PRESETS[options.preset]
    head = about(sizes, device, arguments)
    found = {**head, "repeats": options.repeats, **bench(Maker(sizes, device), options.only, options.repeats)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
