"""The report of a run: one HTML file without outside references, to be read in any browser or sent by mail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from megarlhf.observe.charts import PANELS, Panel, curves_svg, drawable, unit_of
from megarlhf.observe.metrics import GLOSSARY, PHASES
from megarlhf.observe.writers import read_metrics


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
class JudgedResponse:
    """A response with the reward model's score and the verifier's verdict."""

    text: str
    score: float
    correct: bool


@dataclass(frozen=True)
class SampleRow:
    """One prompt, its reference answer, and what the policy said before and after training."""

    prompt: str
    answer: str
    before: JudgedResponse
    after: JudgedResponse


@dataclass(frozen=True)
class Report:
    """What a report says beyond the curves; curves, settings and versions are read from the run directory.

    `stages` names earlier runs whose curves are shown too: title -> run directory, relative to this one.
    """

    title: str
    subtitle: str
    summary: tuple[SummaryRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    stages: tuple[tuple[str, str], ...] = ()


def write_report(run_dir: Path, report: Report) -> Path:
    """Write `report.html`, and `report.json` from which it can be made again, in `run_dir`; return the page's path."""
    (run_dir / "report.json").write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False), encoding="utf-8")
    page = run_dir / "report.html"
    page.write_text(_page(run_dir, report), encoding="utf-8")
    return page


def read_report(run_dir: Path) -> Report:
    """Read `report.json`; a run that has none gets a report with its curves alone."""
    path = run_dir / "report.json"
    if not path.exists():
        return Report(title=run_dir.name, subtitle="Curves of an unfinished or unevaluated run.")
    data = json.loads(path.read_text(encoding="utf-8"))
    return Report(
        title=data["title"],
        subtitle=data["subtitle"],
        summary=tuple(SummaryRow(**row) for row in data["summary"]),
        samples=tuple(_sample(row) for row in data["samples"]),
        stages=tuple((title, path) for title, path in data["stages"]),
    )


def _sample(row: dict[str, Any]) -> SampleRow:
    return SampleRow(
        row["prompt"], row["answer"], before=JudgedResponse(**row["before"]), after=JudgedResponse(**row["after"])
    )


def _page(run_dir: Path, report: Report) -> str:
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    sections = [
        f"<h1>{escape(report.title)}</h1><p class=sub>{escape(report.subtitle)}</p>",
        _summary(report.summary),
        _curves("Curves", read_metrics(run_dir)),
        *(_curves(title, read_metrics(run_dir / path)) for title, path in report.stages),
        _samples(report.samples),
        _phases(read_metrics(run_dir)),
        _files(run_dir),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


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
    return _minus(f"{100 * value:.1f} %" if row.unit == "fraction" else f"{value:.3g}")


def _change(value: float, row: SummaryRow) -> str:
    return _minus(f"{100 * value:+.1f} points" if row.unit == "fraction" else f"{value:+.3g}")


def _interval(row: SummaryRow) -> str:
    return f"{_change(row.low, row).removesuffix(' points')} to {_change(row.high, row)}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _curves(title: str, rows: Sequence[dict[str, float]]) -> str:
    panels = [panel for panel in (drawable(panel, rows) for panel in PANELS) if panel.metrics]
    if not panels:
        return ""
    figures = "".join(_figure(title, panel, rows) for panel in panels)
    return f"<h2>{escape(title)}</h2><div class=charts>{figures}</div>"


def _figure(section: str, panel: Panel, rows: Sequence[dict[str, float]]) -> str:
    meaning = "".join(
        f"<dt>{escape(name)}<dd>{escape(GLOSSARY[name].formula)}; {escape(GLOSSARY[name].reduction)}"
        for name in panel.metrics
    )
    svg = curves_svg(panel, rows, prefix=section)
    return (
        f"<figure class=card><h3>{escape(panel.title)}<span>{escape(unit_of(panel))}</span></h3>{svg}"
        f"<details><summary>What is this?</summary><dl>{meaning}</dl></details></figure>"
    )


def _samples(rows: Sequence[SampleRow]) -> str:
    if not rows:
        return ""
    cards = "".join(
        f"<article class='sample card'><p class=prompt>{escape(row.prompt)}</p>"
        f"<p class=answer>Reference answer: <b>{escape(row.answer)}</b></p>"
        f"<div class=pair>{_response('Before', row.before)}{_response('After', row.after)}</div></article>"
        for row in rows
    )
    return f"<h2>Sample rollouts</h2><p class=note>The same held-out prompts before and after.</p>{cards}"


def _response(when: str, response: JudgedResponse) -> str:
    mark, word = ("✓", "right") if response.correct else ("✗", "wrong")
    return (
        f"<div class=response><header>{when} <span class='badge {word}'>{mark} {word}</span>"
        f"<span class=score>score {_minus(f'{response.score:+.2f}')}</span></header>"
        f"<pre>{escape(response.text)}</pre></div>"
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
    names = {"command.txt": "Command", "config.yaml": "Settings", "versions.json": "Versions"}
    folds = "".join(
        f"<details class='fold card'><summary>{title}</summary>"
        f"<pre class=file>{escape((run_dir / name).read_text(encoding='utf-8'))}</pre></details>"
        for name, title in names.items()
        if (run_dir / name).exists()
    )
    return f"<h2>How to run this again</h2>{folds}" if folds else ""
