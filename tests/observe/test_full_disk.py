"""A disk that fills up: whatever is being written, one error names the path and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megarlhf.commands.row_file import Done, output_file
from megarlhf.data.row import Row
from megarlhf.errors import OutputError
from megarlhf.observe.provenance import write_provenance
from megarlhf.observe.report import Report, write_report
from megarlhf.observe.writers import RunWriter
from megarlhf.trainers.sft import SftConfig
from tests.helpers.disks import no_file_beyond

LONG = "x" * 200


def log_metrics(where: Path) -> None:
    with RunWriter(where) as writer:
        for step in range(9):
            writer.log({"policy/loss": 1.0, "value/loss": 2.0}, step)


def log_samples(where: Path) -> None:
    with RunWriter(where) as writer:
        writer.samples([{"response": LONG}], 1)


def begin(where: Path) -> None:
    write_provenance(where, SftConfig(run_dir=where), ["sft"])


def report(where: Path) -> None:
    write_report(where, Report(title=LONG, subtitle=""))


def score(where: Path) -> None:
    output = output_file(where / "scores.jsonl", {}, ("score",))
    with output.open_after(Done(0, 0)) as file:
        output.write(file, [Row("rows.jsonl", 1, {"prompt": LONG})], [{"score": 1.0}])


DOORS = {
    "metrics.jsonl": log_metrics,
    "samples.jsonl": log_samples,
    "config.yaml": begin,
    "report.json": report,
    "scores.jsonl": score,
}


@pytest.mark.parametrize("name", DOORS)
def test_it_ends_with_the_path_and_the_remedy(name: str, tmp_path: Path) -> None:
    write: Callable[[Path], None] = DOORS[name]
    with no_file_beyond(100), pytest.raises(OutputError, match=rf"{tmp_path / name}.*(File too large|No space left).*"):
        write(tmp_path)
