"""Runs on one page: what differs in their settings, where they ended, and their curves over each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megarlhf.errors import ConfigError
from megarlhf.observe import run_files
from megarlhf.observe.about import About, Setting, read_about
from megarlhf.observe.cautions import cautions_of
from megarlhf.observe.charts import chart
from megarlhf.observe.curves import figure, series_of
from megarlhf.observe.files import own_file, write_whole
from megarlhf.observe.metrics import meaning
from megarlhf.observe.page import contents, minus, names, row, section, slug, table, whole_page
from megarlhf.observe.panels import Panel, labels, panels_of
from megarlhf.observe.report import took, trainer_of
from megarlhf.observe.status import Status, status_of
from megarlhf.observe.writers import MetricLog, logged, read_metrics

KIND = "megarlhf report of several runs"
"""What such a page says that it is."""
ABSENT = "–"
_LONGEST = 100
"""Letters of the page's name that are the runs'."""


@dataclass(frozen=True)
class Compared:
    """A run, and what the others know it by."""

    name: str
    path: Path
    log: MetricLog
    about: About | None
    status: Status

    @property
    def settings(self) -> dict[str, Setting]:
        """By name, without the one that tells any two runs apart."""
        said = self.about.settings if self.about else ()
        return {each.name: each for each in said if each.name != "run_dir"}

    def last(self, metric: str) -> float | None:
        """Its last value."""
        return next((at[metric] for at in reversed(self.log.rows) if metric in at), None)


def page_of(run_dirs: Sequence[Path]) -> Path:
    """Where the page of these runs goes when nobody says: into the working directory, under their names."""
    name = "_vs_".join(map(slug, names_of(run_dirs)))
    return Path(f"{name if len(name) <= _LONGEST else f'{len(run_dirs)}_runs'}.html")


def write_comparison(run_dirs: Sequence[Path], page: Path) -> Path:
    """Write the page of the runs to `page`, and return that.

    Raises:   ConfigError where another file is there already; DataError for a damaged run.
    """
    check_replaceable(page)
    runs = [_read(name, path) for name, path in zip(names_of(run_dirs), run_dirs, strict=True)]
    title = " vs ".join(run.name for run in runs)
    head = [
        "".join(cautions_of(run.status, run.log.rows, of=run.name) for run in runs),
        f"<header class=head><h1>{escape(title)}</h1></header>",
    ]
    sections = [
        section("Runs", _runs(runs)),
        section("Settings that differ", _settings(runs)),
        _curves(runs),
        section("Last values", _values(runs)),
    ]
    write_whole(page, whole_page(title, KIND, [*head, contents(sections), *sections]))
    return page


def check_replaceable(page: Path) -> None:
    """Raise ConfigError where `page` is there, and is no page of several runs, which may be made again."""
    if page.is_symlink() or page.exists():
        start = page.read_bytes()[:500] if page.is_file() else b""
        if f'content="{KIND}"'.encode() not in start:
            raise ConfigError(f"{page} is there, and no page of this command; name another file with output=FILE.html.")


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """What tells the runs apart: their last directories, as few as it takes."""
    parts = [path.resolve().parts[1:] for path in run_dirs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"the same run is named twice: {', '.join(map(str, run_dirs))}; name each once.")


def _read(name: str, run_dir: Path) -> Compared:
    log, about = read_metrics(run_dir), read_about(run_dir)
    return Compared(name, run_dir, log, about, status_of(run_dir, log.rows, about))


def _runs(runs: Sequence[Compared]) -> str:
    rows = (
        names(
            run.name,
            run.status.text,
            trainer_of(run.path),
            took(run.log.rows),
            f"{run.about.ranks} x {run.about.device}" if run.about else ABSENT,
            _versions(run.path).get("commit", ABSENT)[:12],
        )
        for run in runs
    )
    return table(("Run", "Status", "Trainer", "Steps took", "Ran on", "Commit"), rows, kind="texts")


def _settings(runs: Sequence[Compared]) -> str:
    """Settings and packages in which the runs are not alike; of a setting that not all have, where it was changed."""
    said = [run.settings for run in runs]
    changed = {name for each in said for name, setting in each.items() if setting.differs}
    shared = {name for name in said[0] if all(name in each for each in said)}
    settings = [{name: of.value for name, of in each.items() if name in changed | shared} for each in said]
    packages = [{f"version of {name}": text for name, text in _versions(run.path).items()} for run in runs]
    return _differing(settings, runs) + _differing(packages, runs)


def _differing(said: Sequence[Mapping[str, str]], runs: Sequence[Compared]) -> str:
    values = {
        name: [each.get(name, ABSENT) for each in said]
        for name in dict.fromkeys(name for each in said for name in each)
    }
    rows = (names(name, *each) for name, each in values.items() if len(set(each)) > 1)
    return table(("", *(run.name for run in runs)), rows, kind="texts")


def _versions(run_dir: Path) -> dict[str, str]:
    path = own_file(run_dir, run_files.VERSIONS)
    try:
        said = json.loads(path.read_bytes()) if path else {}
    except (ValueError, RecursionError):
        return {}
    return {str(name): str(text) for name, text in said.items()} if isinstance(said, dict) else {}


def _curves(runs: Sequence[Compared]) -> str:
    """Each metric that two runs logged, over each other."""
    rows = [at for run in runs for at in run.log.rows]
    ends = (min(at["step"] for at in rows), max(at["step"] for at in rows)) if rows else (0, 0)
    body = ""
    for title, panels in panels_of(rows).items():
        drawn = ""
        for panel in (alone for several in panels for alone in _each(several)):
            series = [series_of(run.name, panel.metrics[0], run.log.rows) for run in runs]
            # A run keeps its colour in every chart: one that did not log the metric has a curve without points.
            if sum(bool(each.steps) for each in series) > 1:
                drawn += figure(panel, chart(series, panel.unit, ends))
        body += f"<h3>{escape(title)}</h3><div class=charts>{drawn}</div>" if drawn else ""
    return section("Curves", body)


def _each(panel: Panel) -> list[Panel]:
    """A panel for each metric, since colours are runs here."""
    if len(panel.metrics) == 1:
        return [panel]
    titles = (
        panel.title if label == panel.title.lower() else f"{panel.title}, {label}" for label in labels(panel.metrics)
    )
    return [Panel(title, (metric,)) for title, metric in zip(titles, panel.metrics, strict=True)]


def _values(runs: Sequence[Compared]) -> str:
    first, *others = runs
    rows = []
    for name in logged([at for run in runs for at in run.log.rows]):
        last = [run.last(name) for run in runs]
        from_first = [None if last[0] is None or value is None else value - last[0] for value in last[1:]]
        cells = [ABSENT if value is None else minus(f"{value:.4g}") for value in last]
        rows.append(row(name, *cells, *_signed(from_first), meaning(name).unit))
    head = ("Metric", *(run.name for run in runs), *(f"{run.name} − {first.name}" for run in others), "Unit")
    return table(head, rows)


def _signed(values: Sequence[float | None]) -> list[str]:
    return [ABSENT if value is None else minus(f"{value:+.4g}") for value in values]
