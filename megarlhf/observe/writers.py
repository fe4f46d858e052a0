"""What a run leaves behind: metrics and samples as JSON lines, TensorBoard, Weights & Biases, and its provenance."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megarlhf.errors import ConfigError
from megarlhf.observe.files import json_line, json_lines, own_file, write_whole, writing
from megarlhf.observe.metrics import Metrics, check
from megarlhf.observe.run_files import METRICS, SAMPLES, TENSORBOARD, WANDB


class RunWriter:
    """Writes one run's metrics and samples; `metrics.jsonl` always, the rest when asked.

    Ranks:    rank 0 only; the other ranks make none.
    Raises:   UnknownMetricError for a name not in the glossary.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool = False, wandb: Mapping[str, Any] | None = None) -> None:
        """Open the files in `run_dir`, creating it; an existing metrics file is continued.

        wandb: the settings that Weights & Biases keeps of the run; None logs nothing there.
        """
        self.run_dir = run_dir
        with writing(run_dir / METRICS):
            run_dir.mkdir(parents=True, exist_ok=True)
            # Line buffered: a killed run loses at most the line it was writing.
            self._metrics = (run_dir / METRICS).open("a", encoding="utf-8", buffering=1)
        self._samples = run_dir / SAMPLES
        # Opened at the first step, which may not be 1: the events of a run that goes on are cut there.
        self._events: Any = None
        self._tensorboard = tensorboard
        self._wandb = None if wandb is None else _wandb(run_dir, wandb)

    def log(self, metrics: Metrics, step: int) -> None:
        """Write one line of metrics; non-finite values become null, since JSON has no word for them."""
        check(metrics)
        with writing(self.run_dir / METRICS):
            self._metrics.write(json_line({"step": step, **{name: float(value) for name, value in metrics.items()}}))
        if self._tensorboard:
            self._events = self._events or _tensorboard(self.run_dir, step)
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def samples(self, rows: Iterable[Mapping[str, Any]], step: int) -> None:
        """Append rows, for example rollouts as text, to `samples.jsonl`."""
        written = list(rows)
        with writing(self._samples), self._samples.open("a", encoding="utf-8") as file:
            file.writelines(json_line({"step": step, **row}) for row in written)
        if self._wandb is not None and written:
            self._wandb.log({"samples": _wandb_table(written)}, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> RunWriter:
        """Return the writer; it closes at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. What a full disk says now is what it said before."""
        with suppress(OSError) if error is not None else writing(self.run_dir):
            self.close()


LARGEST = 1e100
"""No metric goes beyond: they are made from fp32, which ends at 3.4e38. A chart could not hold the largest fp64."""


class MetricLog(NamedTuple):
    """What metrics.jsonl holds: one mapping a step, `step` among them, in order; null values are left out."""

    rows: list[dict[str, float]]
    unread: int
    """Lines with something that no run writes, which is left out."""


def read_metrics(run_dir: Path) -> MetricLog:
    """Read `metrics.jsonl`, of which a torn last line is left out; no rows where there is none.

    After a resume a step can appear twice; the later line counts.
    """
    by_step: dict[int, dict[str, float]] = {}
    unread = 0
    for row in json_lines(own_file(run_dir, METRICS)):
        step = None if row is None else row.pop("step", None)
        if row is None or type(step) is not int or not 0 <= step < 2**53:
            unread += 1
            continue
        numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
        unread += any(value is not None and name not in numbers for name, value in row.items())
        by_step.setdefault(step, {"step": step}).update(numbers)
    return MetricLog([by_step[step] for step in sorted(by_step)], unread)


def logged(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The names of the metrics in any of the rows, in the order in which they were first logged."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return [name for name in names if name != "step"]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Check that what is asked for can be used, before anything is loaded.

    Raises:   ConfigError naming the package that is missing, which may be one that the tracker needs, or the key.
    """
    if tensorboard:
        _check_import("tensorboard", "torch.utils.tensorboard", install="tensorboard")
    if wandb:
        _check_import("wandb", "wandb", install="-e '.[wandb]' in the checkout")
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") != "offline":
            raise ConfigError("wandb=true: no key; set WANDB_API_KEY (or WANDB_MODE=offline) in the environment.")


def _check_import(setting: str, module: str, *, install: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and missing == setting:
            problem = f"the package {setting} is missing"
        elif isinstance(error, ModuleNotFoundError):
            problem = f"the package {missing}, which {setting} needs, is missing"
        else:
            problem = f"the package {setting} cannot be imported ({error})"
        raise ConfigError(f"{setting}=true: {problem}; pip install {install}, or set {setting}=false.") from None


def _tensorboard(run_dir: Path, first: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # A run that goes on takes steps again that were logged and not saved: readers drop what is there from `first` on.
    return SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first)


def _wandb(run_dir: Path, settings: Mapping[str, Any]) -> Any:
    """Start the W&B run of `run_dir`, or go on with it: steps that it has already it takes no second time.

    The key comes from the environment alone, so that it can never end up in a config on disk.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    known = own_file(run_dir, WANDB)
    identity = known.read_text(encoding="utf-8").strip() if known else uuid.uuid4().hex
    if known is None:
        write_whole(run_dir / WANDB, identity + "\n")
    run = wandb.init(project="megarlhf", name=run_dir.name, dir=str(run_dir), id=identity, resume="allow")
    run.config.update(dict(settings), allow_val_change=True)
    return run


def _wandb_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as W&B shows them; what is no number or text, such as a conversation, as JSON."""
    import wandb  # pyright: ignore[reportMissingImports]

    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[_cell(row.get(name)) for name in columns] for row in rows])


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
