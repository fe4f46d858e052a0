"""Where two runs' metrics part: the first step and metric that differ, and how far every metric goes.

    python tools/compare_runs.py runs/a runs/b                bit for bit
    python tools/compare_runs.py runs/a runs/b --rtol 1e-4    up to rounding, as between two layouts

Two numbers are equal when |a - b| <= max(rtol * max(|a|, |b|), atol). A number that was not finite is null in
metrics.jsonl; null equals null alone. A step that was logged twice, by a run that was resumed, counts as it was logged
last. Times, throughputs and memory depend on the machine's day and are left out without --all.

Settings that differ are listed too; they alone make no two runs different. Exit codes: 0 the metrics are equal,
1 they differ, 2 the input must be changed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from megarlhf.config import yaml12
from megarlhf.errors import DataError, MegarlhfError, complain
from megarlhf.observe import run_files
from megarlhf.observe.terminal import Terminal
from megarlhf.runtime.outputs import check_parent

EQUAL, DIFFERENT, BAD_INPUT = 0, 1, 2
CLOCKED = ("time/", "throughput/", "memory/", "refit/seconds", "refit/gb_per_s")
"""Families of metrics that are left out."""
ABSENT = "absent"
"""Stands for the value of a metric that a step lacks, or of a setting that a run lacks."""

Value = float | str | None
"""A logged number, None for null, or ABSENT."""
Steps = dict[int, dict[str, Value]]
"""Metrics by name, by step."""


@dataclass(frozen=True)
class Difference:
    """One metric at one step, in run A and in run B."""

    step: int
    metric: str
    a: Value
    b: Value

    @property
    def absolute(self) -> float:
        """|a - b|; infinite where one of them is no number."""
        return abs(self.a - self.b) if isinstance(self.a, float) and isinstance(self.b, float) else math.inf

    @property
    def relative(self) -> float:
        """|a - b| / max(|a|, |b|); infinite where one of them is no number."""
        if not isinstance(self.a, float) or not isinstance(self.b, float):
            return math.inf
        return self.absolute / max(abs(self.a), abs(self.b))

    def report(self) -> dict[str, Any]:
        """For JSON, which has no word for infinity: null."""
        sizes = {"absolute": self.absolute, "relative": self.relative}
        return {**vars(self), **{name: size if math.isfinite(size) else None for name, size in sizes.items()}}


def read_steps(run: Path, *, every_family: bool) -> Steps:
    """The metrics of `run`, nulls kept; a last line that was cut while it was written is left out.

    Raises:   DataError when the directory or its metrics.jsonl is missing, has no step, or a line cannot be read.
    """
    path = run / run_files.METRICS
    if not run.is_dir():
        raise DataError(f"run directory does not exist: {run}; check the path.")
    if not path.is_file():
        raise DataError(f"run directory {run}: metrics.jsonl is missing; name the run_dir of a run.")
    steps: Steps = {}
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, rest] if rest.endswith("}") else lines, start=1):
        step, metrics = _parse(line, f"{path}, line {number}")
        kept = {name: value for name, value in metrics.items() if every_family or not name.startswith(CLOCKED)}
        steps.setdefault(step, {}).update(kept)
    if not steps:
        raise DataError(f"{path}: no step was logged; let the run take one.")
    return dict(sorted(steps.items()))


def _parse(line: str, where: str) -> tuple[int, dict[str, Value]]:
    try:
        row = json.loads(line)
        step = row.pop("step")
        return int(step), {name: None if value is None else float(value) for name, value in row.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise DataError(f"{where}: not metrics of a step ({line[:60]!r}); restore the file.") from None


def differences(a: Steps, b: Steps, *, rtol: float, atol: float) -> Iterator[Difference]:
    """What differs at the steps that both have, by step, then in the order in which metrics were logged."""
    for step in (step for step in a if step in b):
        for metric in a[step] | b[step]:
            found = Difference(step, metric, a[step].get(metric, ABSENT), b[step].get(metric, ABSENT))
            if not _close(found.a, found.b, rtol, atol):
                yield found


def _close(a: Value, b: Value, rtol: float, atol: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=rtol, abs_tol=atol)
    return a == b


def by_metric(found: Sequence[Difference]) -> dict[str, list[Difference]]:
    """Differences by metric, each list by step; metrics in the order of their first difference."""
    grouped: dict[str, list[Difference]] = {}
    for difference in found:
        grouped.setdefault(difference.metric, []).append(difference)
    return grouped


def read_settings(run: Path) -> dict[str, Any]:
    """Every setting of `run` by its dotted name; none without a config.yaml.

    Raises:   DataError when config.yaml cannot be read.
    """
    path = run / run_files.CONFIG
    try:
        return dict(_flat(yaml12.parse(path.read_text(encoding="utf-8")))) if path.is_file() else {}
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not settings ({' '.join(str(error).split())}); restore the file.") from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def changed_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(value in A, value in B) of every setting that differs."""
    pairs = {name: (a.get(name, ABSENT), b.get(name, ABSENT)) for name in {**a, **b}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def ranges(steps: Sequence[int]) -> str:
    """Ascending steps in short: 1-3, 7."""
    runs = [list(run) for _, run in groupby(enumerate(steps), lambda place: place[1] - place[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def show(report: Mapping[str, Any], grouped: Mapping[str, Sequence[Difference]], console: Terminal) -> None:
    """Print everything found."""
    first = next(iter(grouped.values()))[0] if grouped else None
    if first is None:
        console.print(f"all metrics are equal at the {report['steps_in_both']} steps of both runs")
    else:
        console.print(
            f"first difference: step {first.step}, {first.metric}: A {_text(first.a)}, B {_text(first.b)}; "
            f"absolute {_size(first.absolute)}, relative {_size(first.relative)}"
        )
        console.print(_table(grouped))
    for name in ("A", "B"):
        only = report[f"steps_only_in_{name.lower()}"]
        if only:
            console.print(f"steps only in {name}: {ranges(only)} ({len(only)})")
    for name, (a, b) in report["settings"].items():
        console.print(f"setting {name}: A {a!r}, B {b!r}")
    for run in report["without_settings"]:
        console.print(f"no config.yaml in {run}: settings were not compared")


def _table(grouped: Mapping[str, Sequence[Difference]]) -> Table:
    table = Table(title="metrics that differ", title_justify="left")
    table.add_column("metric")
    for column in ("steps", "first", "A", "B", "absolute", "relative", "max absolute", "at step", "max relative"):
        table.add_column(column, justify="right")
    for metric, found in grouped.items():
        first, largest = found[0], max(found, key=lambda difference: difference.absolute)
        sizes = (_size(first.absolute), _size(first.relative), _size(largest.absolute), str(largest.step))
        most = _size(max(difference.relative for difference in found))
        table.add_row(metric, str(len(found)), str(first.step), _text(first.a), _text(first.b), *sizes, most)
    return table


def _text(value: Value) -> str:
    return "null" if value is None else value if isinstance(value, str) else repr(value)


def _size(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def compare(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[Difference]]]:
    """The report that --json writes, and all differences by metric."""
    a, b = (read_steps(run, every_family=args.all) for run in (args.a, args.b))
    grouped = by_metric(list(differences(a, b, rtol=args.rtol, atol=args.atol)))
    settings = [read_settings(run) for run in (args.a, args.b)]
    only_a, only_b = [step for step in a if step not in b], [step for step in b if step not in a]
    report = {
        "a": str(args.a),
        "b": str(args.b),
        "equal": not (grouped or only_a or only_b),
        "rtol": args.rtol,
        "atol": args.atol,
        "steps_in_both": len(a) - len(only_a),
        "steps_only_in_a": only_a,
        "steps_only_in_b": only_b,
        "first": next((found[0].report() for found in grouped.values()), None),
        "metrics": {
            metric: {
                "steps": len(found),
                "first": found[0].report(),
                "max_absolute": max(found, key=lambda difference: difference.absolute).report(),
                "max_relative": max(found, key=lambda difference: difference.relative).report(),
            }
            for metric, found in grouped.items()
        },
        "settings": changed_settings(*settings) if all(settings) else {},
        "without_settings": [str(run) for run, found in zip((args.a, args.b), settings, strict=True) if not found],
    }
    return report, grouped


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", type=Path, metavar="RUN_A", help="run_dir of a run")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="run_dir of another")
    parser.add_argument("--rtol", type=_tolerance, default=0.0, help="relative tolerance (default 0)")
    parser.add_argument("--atol", type=_tolerance, default=0.0, help="absolute tolerance (default 0)")
    parser.add_argument("--all", action="store_true", help=f"compare {', '.join(CLOCKED)} too")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    return parser.parse_args(arguments)


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no tolerance; give a number of at least 0")
    return value


def main(arguments: Sequence[str]) -> int:
    """Compare, print, write, and return the exit code."""
    args = parse(arguments)
    try:
        if args.json:
            check_parent(args.json, "--json")
        report, grouped = compare(args)
    except MegarlhfError as error:
        complain(str(error))
        return BAD_INPUT
    # Piped to a file there is no width to respect.
    console = Terminal(width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    show(report, grouped, console)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return EQUAL if report["equal"] else DIFFERENT


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
