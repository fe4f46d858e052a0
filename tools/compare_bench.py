"""Two reports of bench_throughput.py, or of bench_step.py, phase by phase: how much faster or slower B is than A.

    python tools/compare_bench.py before.json after.json

A ratio is that of the medians of seconds, B's by A's: below 1, B is faster. Beside it stand the smallest and largest
ratio that a single iteration of B has to A's median, marked (< or >) where that range leaves 1 out.
What differs in settings, versions and machine is listed first: two reports of different work are no comparison.
Exit codes: 0, or 2 when the input must be changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LEFT_OUT = (
    "command",
    "phases",
    "load_average",
    "offload",
    "refit",
    "published",
    "peak_bytes",
    "planned_peak",
    "transformers",
    "trl",
)
"""Of a report: what is no setting."""


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a report by its dotted name, without what was measured."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        if key not in LEFT_OUT:
            yield from flat(inner, f"{name}.{key}" if name else key)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What the two were made with, where it is not the same."""
    of_a, of_b = dict(flat(a)), dict(flat(b))
    names = [name for name in (*of_a, *(of_b.keys() - of_a.keys())) if of_a.get(name) != of_b.get(name)]
    return [f"{name}: {of_a.get(name)} in A, {of_b.get(name)} in B" for name in names]


def compared(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A line a phase that both have."""
    theirs = {row["phase"]: row["all_seconds"] for row in b["phases"]}
    lines = [f"{'phase':<16}{'A, s':>10}{'B, s':>10}{'B / A':>8}{'  of single iterations':<24}"]
    for row in a["phases"]:
        if row["phase"] not in theirs:
            continue
        before, seconds = statistics.median(row["all_seconds"]), theirs[row["phase"]]
        after, least, most = statistics.median(seconds), min(seconds) / before, max(seconds) / before
        mark = " <" if most < 1 else " >" if least > 1 else ""
        lines.append(
            f"{row['phase']:<16}{before:>10.3f}{after:>10.3f}{after / before:>8.2f}  {least:.2f} to {most:.2f}{mark}"
        )
    return lines


def read(path: Path) -> dict[str, Any]:
    """A report.

    Raises:   ValueError where it is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["phase"], statistics.median(row["all_seconds"])) for row in report["phases"]]
    except (OSError, ValueError, TypeError, KeyError, statistics.StatisticsError) as error:
        raise ValueError(f"{path}: no report of a benchmark's phases ({error}); make one with --json.") from None
    if not all(seconds > 0 for _, seconds in rows):
        raise ValueError(f"{path}: a phase took no time; make the report again with --json.")
    return report


def main(arguments: Sequence[str]) -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", type=Path, metavar="A", help="report of before, by --json")
    parser.add_argument("b", type=Path, metavar="B", help="report of after")
    args = parser.parse_args(arguments)
    try:
        a, b = read(args.a), read(args.b)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("\n".join([*differences(a, b), *compared(a, b), ""]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
