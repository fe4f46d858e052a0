"""What pages of every kind are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megarlhf.observe.charts import Panel, curves_svg, drawable, panels_of, unit_of
from megarlhf.observe.metrics import meaning
from megarlhf.observe.writers import MetricLog


def curves(title: str, log: MetricLog) -> str:
    """A section with a chart for each panel that has something to draw."""
    panels = [panel for panel in (drawable(panel, log.rows) for panel in panels_of(log.rows)) if panel.metrics]
    unread = f"<p class=note>{log.unread} lines of metrics.jsonl that no run writes are left out.</p>"
    if not panels and not log.unread:
        return ""
    figures = "".join(_figure(title, panel, log.rows) for panel in panels)
    return f"<h2>{escape(title)}</h2>{unread if log.unread else ''}<div class=charts>{figures}</div>"


def _figure(section: str, panel: Panel, rows: Sequence[dict[str, float]]) -> str:
    entries = ((name, meaning(name)) for name in panel.metrics)
    meanings = "".join(f"<dt>{escape(name)}<dd>{escape(f'{of.formula}; {of.reduction}')}" for name, of in entries)
    svg = curves_svg(panel, rows, prefix=section)
    return (
        f"<figure class=card><h3>{escape(panel.title)}<span>{escape(unit_of(panel))}</span></h3>{svg}"
        f"<details><summary>What is this?</summary><dl>{meanings}</dl></details></figure>"
    )


def minus(text: str) -> str:
    """`text` with the sign that a page has for a hyphen before a number."""
    return text.replace("-", "−")
