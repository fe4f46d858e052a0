"""What pages of every kind are made of, but for curves."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

TABS = 12
"""Parts of a page of which one is shown; the style sheet has a rule for each."""


def whole_page(title: str, kind: str, sections: Iterable[str]) -> str:
    """The page: `sections` of HTML, of which empty ones are left out. kind: of the page, for whoever finds it.

    The policy in it lets a browser run the page's own script alone and load nothing, whatever a run's files hold.
    """
    here = Path(__file__).parent
    css, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{kind}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )
    # As UTF-8 can hold it: half a surrogate pair, which JSON may hold, becomes a question mark.
    return page.encode("utf-8", "replace").decode("utf-8")


def section(title: str, body: str) -> str:
    """A part of a page with its title, to which a link may lead; nothing where there is nothing in it."""
    return f'<h2 id="{slug(title)}">{escape(title)}</h2>{body}' if body else ""


def slug(text: str) -> str:
    """`text` as an id."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def contents(sections: Iterable[str]) -> str:
    """Links to the titles of the sections."""
    titles = (found for part in sections for found in re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', part))
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title in titles)
    return f"<nav>{links}</nav>" if links else ""


def table(head: Sequence[str], rows: Iterable[str], *, kind: str = "numbers") -> str:
    """A table of rows of HTML, which scrolls where it is too wide; nothing where there is no row.

    kind: numbers, which stand at the right of their columns, or texts.
    """
    body = "".join(rows)
    if not body:
        return ""
    titles = "".join(f"<th>{escape(name)}" for name in head)
    return (
        f"<div class='card scroll' tabindex=0><table class={kind}><thead><tr>{titles}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def row(*cells: str) -> str:
    """A row of a table; what stands in a cell is text."""
    return f"<tr>{''.join(f'<td>{escape(cell)}' for cell in cells)}</tr>"


def names(*cells: str) -> str:
    """A row of names and values, which may break between their parts."""
    return f"<tr>{''.join(f'<td>{in_parts(cell)}' for cell in cells)}</tr>"


def in_parts(name: str) -> str:
    """A name in HTML that may break after a dot, a slash or a line below."""
    return re.sub(r"(?<=\w)([./_])(?=\w)", r"\1<wbr>", escape(name))


def fold(title: str, body: str) -> str:
    """What is there for those who ask."""
    return f"<details class='fold card'><summary>{escape(title)}</summary>{body}</details>" if body else ""


def tabs(name: str, parts: Sequence[tuple[str, str]], *, shown: int) -> str:
    """Parts by title, at most TABS, of which a reader chooses one, without a script; `shown` is chosen at first.

    name: of the choice, another for each of a page.
    """
    chosen = "".join(
        f"<input type=radio name='{name}' id='{name}-{at}'{' checked' if at == shown else ''}>"
        f"<label for='{name}-{at}'>{escape(title)}</label>"
        for at, (title, _) in enumerate(parts)
    )
    panels = "".join(f"<div class=panel>{body}</div>" for _, body in parts)
    return f"<div class=tabs role=group>{chosen}<div class=panels>{panels}</div></div>"


def tile(name: str, value: str, change: str = "") -> str:
    """A number that a reader looks for; HTML but for its name."""
    return (
        f"<div class='tile card'><div class=name>{in_parts(name)}</div><div class=value>{value}</div>"
        f"<div class=change>{change}</div></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, in text; pairs without the latter are left out."""
    return "".join(f"<div><dt>{escape(name)}<dd>{escape(text)}</div>" for name, text in pairs if text)


def minus(text: str) -> str:
    """`text` with the sign that a page has for a hyphen before a number."""
    return text.replace("-", "−")


def quantity(value: float, unit: str) -> str:
    """A value for people, in its unit."""
    if unit == "fraction":
        return minus(f"{100 * value:.1f} %")
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    if unit == "s":
        return duration(value)
    return minus(f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}")


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return f"{minutes} min" if minutes < 90 else f"{hours:g} h"
