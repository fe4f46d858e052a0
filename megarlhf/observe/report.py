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
from megarlhf.observe.charts import panels_of
from megarlhf.observe.files import own_file, write_whole
from megarlhf.observe.metrics import PHASES, meaning
from megarlhf.observe.page import curves, minus
from megarlhf.observe.samples import JudgedResponse, SampleRow, compared_section, rollouts_section
from megarlhf.observe.writers import read_metrics

__all__ = ["JudgedResponse", "Report", "SampleRow", "SummaryRow", "read_report", "write_page", "write_report"]


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
    """What a report says beyond the curves; curves, settings and versions are read from the run directory.

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
    write_whole(run_dir / run_files.REPORT_DATA, _printable(json.dumps(asdict(report), indent=1, ensure_ascii=False)))
    return write_page(run_dir)


def write_page(run_dir: Path) -> Path:
    """Write `report.html` from what `run_dir` holds; return its path.

    Raises:   DataError naming the file that is damaged, or that leads out of the run.
    """
    page = run_dir / run_files.REPORT
    write_whole(page, _printable(_page(run_dir, read_report(run_dir))))
    return page


def read_report(run_dir: Path) -> Report:
    """Read `report.json`; a run that has none gets a report of what it logged.

    Raises:   DataError when it is damaged, or names a run outside of `run_dir`.
    """
    path = own_file(run_dir, run_files.REPORT_DATA)
    if path is None:
        return Report(title=run_dir.resolve().name, subtitle=_state(run_dir))
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


def _state(run_dir: Path) -> str:
    rows = read_metrics(run_dir).rows
    if not rows:
        return "No step was logged."
    steps = f"{rows[-1]['step']:.0f} steps"
    return f"Finished after {steps}." if (run_dir / run_files.MODEL).is_dir() else f"Not finished: {steps} so far."


def _printable(text: str) -> str:
    """`text` as UTF-8 can hold it: half a surrogate pair, which JSON may hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _page(directory: Path, report: Report) -> str:
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    run_dir = directory / report.main
    log = read_metrics(run_dir)
    sections = [
        _warnings(log.rows),
        f"<h1>{escape(report.title)}</h1><p class=sub>{escape(report.subtitle)}</p>",
        _summary(report.summary),
        _judges(log.rows),
        _values(log.rows),
        curves("Curves", log),
        *(curves(title, read_metrics(directory / path)) for title, path in report.stages),
        compared_section(report.samples) or rollouts_section(run_dir),
        _phases(log.rows),
        _files(run_dir),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


WARNINGS = {
    "warning/over_optimised": (
        "The score rises while accuracy falls: the reward model is over-optimised",
        ("rollout/score_mean", "rollout/accuracy"),
    ),
    "warning/kl_over_bound": ("The policy is farther from the reference than kl_bound", ("kl/reference_mean",)),
}


def _warnings(rows: Sequence[Mapping[str, float]]) -> str:
    """What the run warned of, from which step to which, and what became of the quantities that it is about."""
    lines = []
    for name, (text, about) in WARNINGS.items():
        held = [row for row in rows if row.get(name)]
        if held:
            values = "; ".join(
                f"{quantity} {rows[0][quantity]:.3g} → {held[-1][quantity]:.3g}"
                for quantity in about
                if quantity in rows[0] and quantity in held[-1]
            )
            steps = f"steps {held[0]['step']:.0f} to {held[-1]['step']:.0f}"
            lines.append(f"<p class=warning><b>{text}</b> ({steps}). {minus(values)}</p>")
    return "".join(lines)


def _summary(rows: Sequence[SummaryRow]) -> str:
    if not rows:
        return ""
    tiles = "".join(
        f"<div class='tile card'><div class=name>{escape(row.name)}</div>"
        f"<div class=value><span class=from>{_number(row.before, row)} → </span>{_number(row.after, row)}</div>"
        f"<div class=change><b>{_change(row.difference, row)}</b> "
        f"<br>95 % interval {_interval(row)}</div></div>"
        for row in rows[:4]
    )
    body = "".join(
        f"<tr><td>{escape(row.name)}<td>{_number(row.before, row)}<td>{_number(row.after, row)}"
        f"<td>{_change(row.difference, row)}<td>{_interval(row)}"
        f"<td>{'yes' if row.low > 0 or row.high < 0 else 'no'}</tr>"
        for row in rows
    )
    head = "<tr><th><th>Before<th>After<th>Difference<th>95 % interval<th>Excludes zero</tr>"
    return (
        f"<div class=tiles>{tiles}</div><h2>Summary</h2>"
        f"<div class='card scroll'><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _number(value: float, row: SummaryRow) -> str:
    return minus(f"{100 * value:.1f} %" if row.unit == "fraction" else f"{value:.3g}")


def _change(value: float, row: SummaryRow) -> str:
    return minus(f"{100 * value:+.1f} points" if row.unit == "fraction" else f"{value:+.3g}")


def _interval(row: SummaryRow) -> str:
    return f"{_change(row.low, row).removesuffix(' points')} to {_change(row.high, row)}"


def _judges(rows: Sequence[Mapping[str, float]]) -> str:
    """What each judge gave at first and at last, what that is in the sum, and what is learnt from."""
    judged = [row for row in rows if "rollout/score_mean" in row]
    names = [name for name in (judged[0] if judged else {}) if re.fullmatch(r"judge/\w+_weight", name)]
    if not names:
        return ""
    body = ""
    for name in names:
        judge, weight = name.removeprefix("judge/").removesuffix("_weight"), judged[-1].get(name, 0.0)
        means = [row.get(f"judge/{judge}_mean", 0.0) for row in (judged[0], judged[-1])]
        numbers = "".join(f"<td>{minus(f'{value:.4g}')}" for value in (weight, *means, *(weight * m for m in means)))
        body += f"<tr><td>{judge}{numbers}</tr>"
    for title, quantity in (
        ("sum", "rollout/score_mean"),
        ("after shaping, and a KL in the reward", "rollout/reward_mean"),
    ):
        ends = "".join(f"<td>{minus(f'{row.get(quantity, 0.0):.4g}')}" for row in (judged[0], judged[-1]))
        body += f"<tr><td>{title}<td><td><td>{ends}</tr>"
    head = "<tr><th>Judge<th>Weight<th>First mean<th>Last mean<th>First, weighed<th>Last, weighed</tr>"
    return f"<h2>Judges</h2><div class='card scroll'><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _values(rows: Sequence[Mapping[str, float]]) -> str:
    """Where every curve begins and ends."""
    body = ""
    for name in (name for panel in panels_of(rows) for name in panel.metrics):
        values = [row[name] for row in rows if name in row]
        if values:
            numbers = f"<td>{minus(f'{values[0]:.4g}')}<td>{minus(f'{values[-1]:.4g}')}"
            body += f"<tr><td>{name}{numbers}<td>{escape(meaning(name).unit)}</tr>"
    head = "<tr><th>Metric<th>First<th>Last<th>Unit</tr>"
    return (
        f"<h2>First and last values</h2><div class='card scroll'><table><thead>{head}</thead>"
        f"<tbody>{body}</tbody></table></div>"
        if body
        else ""
    )


def _phases(rows: Sequence[Mapping[str, float]]) -> str:
    seconds = {phase: sum(row.get(f"time/{phase}_s", 0.0) for row in rows) for phase in PHASES}
    whole = sum(seconds.values())
    if not whole:
        return ""
    body = "".join(
        f"<tr><td>{phase}<td>{spent:.1f} s<td>{100 * spent / whole:.1f} %<td>{_rate(phase, rows)}"
        f"<td class=share><div class=bar style='width:{100 * spent / max(seconds.values()):.1f}%'></div></tr>"
        for phase, spent in seconds.items()
        if spent
    )
    head = "<tr><th>Phase<th>Time<th>Share<th>Tokens/s<th class=share></tr>"
    return (
        f"<h2>Where the time went</h2><div class='card scroll'><table><thead>{head}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _rate(phase: str, rows: Sequence[Mapping[str, float]]) -> str:
    """Tokens per second over the whole run, each step weighing as its seconds."""
    pairs = [
        (row[f"throughput/{phase}_tokens_per_s"], row[f"time/{phase}_s"])
        for row in rows
        if f"throughput/{phase}_tokens_per_s" in row
    ]
    return f"{sum(rate * s for rate, s in pairs) / sum(s for _, s in pairs):,.0f}" if pairs else "–"


def _files(run_dir: Path) -> str:
    names = {run_files.COMMAND: "Command", run_files.CONFIG: "Settings", run_files.VERSIONS: "Versions"}
    found = {title: own_file(run_dir, name) for name, title in names.items()}
    folds = "".join(
        f"<details class='fold card'><summary>{title}</summary>"
        f"<pre class=file>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre></details>"
        for title, path in found.items()
        if path is not None
    )
    return f"<h2>How to run this again</h2>{folds}" if folds else ""
