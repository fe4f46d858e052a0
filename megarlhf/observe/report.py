"""The report of a run: one HTML file without outside references, to be read in any browser or sent by mail.

A run may come from somebody else: nothing outside of its directory is read or written, what its files say is escaped,
and lines that no run writes are left out and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megarlhf.errors import DataError
from megarlhf.observe import run_files
from megarlhf.observe.about import About, read_about
from megarlhf.observe.cautions import cautions_of
from megarlhf.observe.curves import curves
from megarlhf.observe.facts import changes_table, data_table, models_table, settings_table
from megarlhf.observe.files import own_file, write_whole
from megarlhf.observe.metrics import PHASES, meaning
from megarlhf.observe.page import (
    contents,
    duration,
    facts,
    fold,
    minus,
    quantity,
    row,
    section,
    table,
    tile,
    whole_page,
)
from megarlhf.observe.panels import KEY
from megarlhf.observe.samples import JudgedResponse, SampleRow, compared_section, rollouts_section
from megarlhf.observe.starts import read_starts
from megarlhf.observe.status import Status, status_of
from megarlhf.observe.writers import logged, read_metrics

__all__ = ["JudgedResponse", "Report", "SampleRow", "SummaryRow", "read_report", "write_page", "write_report"]

KIND = "megarlhf report"
"""What the page of a run says that it is."""
Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class SummaryRow:
    """One quantity before and after training, with the 95 % interval of the difference.

    `unit` "fraction" is shown in percent (and the difference in points), any other as a number.
    """

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    unit: str = "fraction"


@dataclass(frozen=True)
class Report:
    """What a report says beyond what the run directory tells.

    `main` is the directory of the run that the page is about, and `stages` names earlier runs whose curves are shown
    too, title -> directory; all are relative to the directory that the page lies in, and inside of it.
    """

    title: str
    subtitle: str
    summary: tuple[SummaryRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    stages: tuple[tuple[str, str], ...] = ()
    main: str = "."


def write_report(run_dir: Path, report: Report) -> Path:
    """Write `report.html`, and `report.json` from which it can be made again, in `run_dir`; return the page's path."""
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    write_whole(run_dir / run_files.REPORT_DATA, text)
    return write_page(run_dir)


def write_page(run_dir: Path) -> Path:
    """Write `report.html` from what `run_dir` holds; return its path.

    Raises:   DataError naming the file that is damaged, or that leads out of the run.
    """
    page = run_dir / run_files.REPORT
    write_whole(page, _page(run_dir, read_report(run_dir)))
    return page


def read_report(run_dir: Path) -> Report:
    """Read `report.json`; a run that has none gets a report of what it logged.

    Raises:   DataError when it is damaged, or names a run outside of `run_dir`.
    """
    path = own_file(run_dir, run_files.REPORT_DATA)
    if path is None:
        return Report(title=run_dir.resolve().name, subtitle="")
    remedy = "remove it for a page of the curves alone"
    try:
        report = TypeAdapter(Report).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; {remedy}.") from None
    for directory in (report.main, *(directory for _, directory in report.stages)):
        if not (run_dir / directory).resolve().is_relative_to(run_dir.resolve()):
            raise DataError(f"{path}: {directory!r} is outside of the run; {remedy}.")
    return report


def _page(directory: Path, report: Report) -> str:
    run_dir = directory / report.main
    log, about = read_metrics(run_dir), read_about(run_dir)
    rows = log.rows
    status = status_of(run_dir, rows, about)
    sections = [
        _summary(report.summary) or _tiles(rows),
        _facts(about),
        section("Changed on the way", changes_table(read_starts(run_dir))),
        _judges(rows),
        curves("Curves", log),
        *(curves(title, read_metrics(directory / path)) for title, path in report.stages),
        compared_section(report.samples) or rollouts_section(run_dir),
        _phases(rows),
        section("All metrics", _values(rows)),
        _files(run_dir),
    ]
    head = [cautions_of(status, rows), _head(report, run_dir, status, rows, about), contents(sections)]
    return whole_page(report.title, KIND, [*head, *sections])


def trainer_of(run_dir: Path) -> str:
    """The command that a run is of; the whole module of a trainer of one's own; empty where nobody knows."""
    path = own_file(run_dir, run_files.TRAINER)
    module = path.read_text(encoding="utf-8", errors="replace").strip() if path else ""
    return module.removeprefix("megarlhf.trainers.")


def took(rows: Rows) -> str:
    """How long the steps of a run took together; empty where none was timed."""
    seconds = sum(at.get("time/iteration_s", 0.0) for at in rows)
    return duration(seconds) if seconds else ""


def _head(report: Report, run_dir: Path, status: Status, rows: Rows, about: About | None) -> str:
    """Title and status of the run."""
    starts = read_starts(run_dir)
    again = f", started {len(starts)} times, last {starts[-1].at}" if len(starts) > 1 else ""
    ranks = f"{about.ranks} rank{'s' if about.ranks > 1 else ''}, {about.device}" if about else ""
    known = facts(
        [
            ("Trainer", trainer_of(run_dir)),
            ("Started", f"{starts[0].at}{again}" if starts else ""),
            ("Steps took", took(rows)),
            ("Ran on", ranks),
        ]
    )
    kind = f"<p class=sub>{escape(report.subtitle)}</p>" if report.subtitle else ""
    return (
        f"<header class=head><h1>{escape(report.title)} <span class='badge {status.word}'>{status.word}</span></h1>"
        f"{kind}<p class=sub>{escape(status.text)}</p><dl class=facts>{known}</dl></header>"
    )


def _tiles(rows: Rows) -> str:
    """The numbers that count, as they are at last, and as they were at first."""
    found = [name for name in KEY if any(name in at for at in rows)][:4]
    tiles = ""
    for name in found:
        unit = meaning(name).unit
        values = [at[name] for at in rows if name in at]
        change = f"{quantity(values[0], unit)} at first" if len(values) > 1 else ""
        shown = quantity(values[-1], unit)
        tiles += tile(
            name, shown if unit in ("fraction", "bytes", "s") else f"{shown} <small>{escape(unit)}</small>", change
        )
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _facts(about: About | None) -> str:
    """What the run was made of."""
    if about is None:
        return ""
    return (
        section("Models", models_table(about))
        + section("Data", data_table(about))
        + section("Settings that differ from the defaults", settings_table(about))
    )


def _summary(rows: Sequence[SummaryRow]) -> str:
    if not rows:
        return ""
    tiles = "".join(
        tile(
            row.name,
            f"<span class=from>{_number(row.before, row)} → </span><span>{_number(row.after, row)}</span>",
            f"<b>{_change(row.difference, row)}</b> <br>95 % interval {_interval(row)}",
        )
        for row in rows[:4]
    )
    body = (
        row(
            each.name,
            _number(each.before, each),
            _number(each.after, each),
            _change(each.difference, each),
            _interval(each),
            "yes" if each.low > 0 or each.high < 0 else "no",
        )
        for each in rows
    )
    head = ("", "Before", "After", "Difference", "95 % interval", "Excludes zero")
    return f"<div class=tiles>{tiles}</div>{section('Summary', table(head, body))}"


def _number(value: float, of: SummaryRow) -> str:
    return minus(f"{100 * value:.1f} %" if of.unit == "fraction" else f"{value:.3g}")


def _change(value: float, of: SummaryRow) -> str:
    return minus(f"{100 * value:+.1f} points" if of.unit == "fraction" else f"{value:+.3g}")


def _interval(of: SummaryRow) -> str:
    return f"{_change(of.low, of).removesuffix(' points')} to {_change(of.high, of)}"


def _judges(rows: Rows) -> str:
    """What each judge gave at first and at last, what that is in the sum, and what is learnt from."""
    judged = [at for at in rows if "rollout/score_mean" in at]
    names = [name for name in (judged[0] if judged else {}) if re.fullmatch(r"judge/\w+_weight", name)]
    body = []
    for name in names:
        judge, weight = name.removeprefix("judge/").removesuffix("_weight"), judged[-1].get(name, 0.0)
        means = [at.get(f"judge/{judge}_mean", 0.0) for at in (judged[0], judged[-1])]
        body.append(row(judge, *(minus(f"{value:.4g}") for value in (weight, *means, *(weight * m for m in means)))))
    if not body:
        return ""
    for title, name in (
        ("sum", "rollout/score_mean"),
        ("after shaping, and a KL in the reward", "rollout/reward_mean"),
    ):
        ends = (minus(f"{at.get(name, 0.0):.4g}") for at in (judged[0], judged[-1]))
        body.append(row(title, "", "", "", *ends))
    head = ("Judge", "Weight", "First mean", "Last mean", "First, weighed", "Last, weighed")
    return section("Judges", table(head, body))


def _values(rows: Rows) -> str:
    """Where every metric begins and ends."""
    body = []
    for name in logged(rows):
        values = [at[name] for at in rows if name in at]
        ends = (minus(f"{value:.4g}") for value in (values[0], values[-1], min(values), max(values)))
        body.append(row(name, *ends, meaning(name).unit))
    return fold(
        f"{len(body)} metrics, first and last", table(("Metric", "First", "Last", "Least", "Most", "Unit"), body)
    )


def _phases(rows: Rows) -> str:
    seconds = {phase: sum(at.get(f"time/{phase}_s", 0.0) for at in rows) for phase in PHASES}
    whole = sum(seconds.values())
    body = (
        f"<tr><td>{phase}<td>{spent:.1f} s<td>{100 * spent / whole:.1f} %<td>{_rate(phase, rows)}"
        f"<td class=share><div class=bar style='width:{100 * spent / max(seconds.values()):.1f}%'></div></tr>"
        for phase, spent in seconds.items()
        if spent
    )
    return section("Where the time went", table(("Phase", "Time", "Share", "Tokens/s", ""), body))


def _rate(phase: str, rows: Rows) -> str:
    """Tokens per second over the whole run, each step weighing as its seconds."""
    pairs = [
        (at[f"throughput/{phase}_tokens_per_s"], at[f"time/{phase}_s"])
        for at in rows
        if f"throughput/{phase}_tokens_per_s" in at and f"time/{phase}_s" in at
    ]
    return f"{sum(rate * s for rate, s in pairs) / sum(s for _, s in pairs):,.0f}" if pairs else "–"


def _files(run_dir: Path) -> str:
    names = {run_files.COMMAND: "Command", run_files.CONFIG: "All settings", run_files.VERSIONS: "Versions"}
    found = {title: own_file(run_dir, name) for name, title in names.items()}
    folds = (
        fold(title, f"<pre class=file>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>")
        for title, path in found.items()
        if path is not None
    )
    return section("How to run this again", "".join(folds))
