"""The curves of a page: charts of what runs logged, with what the metrics in them mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from megarlhf.observe.charts import Series, chart
from megarlhf.observe.metrics import meaning
from megarlhf.observe.page import section
from megarlhf.observe.panels import Panel, labels, panels_of
from megarlhf.observe.writers import MetricLog


def curves(title: str, log: MetricLog) -> str:
    """Charts of what a run logged, by section."""
    unread = f"{log.unread} lines of metrics.jsonl that no run writes are left out."
    body = f"<p class=note>{unread}</p>" if log.unread else ""
    for name, panels in panels_of(log.rows).items():
        figures = "".join(_panel_of(panel, log.rows) for panel in panels)
        body += f"<h3>{escape(name)}</h3><div class=charts>{figures}</div>" if figures else ""
    return section(title, body)


def _panel_of(panel: Panel, rows: Sequence[Mapping[str, float]]) -> str:
    named = zip(labels(panel.metrics), panel.metrics, strict=True)
    series = [series_of(label, name, rows) for label, name in named]
    return figure(panel, chart(series, panel.unit, (rows[0]["step"], rows[-1]["step"])))


def series_of(label: str, metric: str, rows: Iterable[Mapping[str, float]]) -> Series:
    """The curve of a metric."""
    there = [(at["step"], at[metric]) for at in rows if metric in at]
    return Series(label, [step for step, _ in there], [value for _, value in there])


def figure(panel: Panel, drawn: str) -> str:
    """A chart with its title, its unit, and what the metrics in it mean."""
    entries = ((name, meaning(name)) for name in panel.metrics)
    meanings = "".join(f"<dt>{escape(name)}<dd>{escape(f'{of.formula}; {of.reduction}')}" for name, of in entries)
    unit = "" if panel.unit == "1" else panel.unit
    return (
        f"<figure class=card><figcaption>{escape(panel.title)}<span>{escape(unit)}</span></figcaption>{drawn}"
        f"<details><summary>What is this?</summary><dl>{meanings}</dl></details></figure>"
    )
