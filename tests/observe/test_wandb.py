"""What Weights & Biases is told, offline: one run, however often it goes on, its settings, and samples as a table."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarlhf.observe.writers import RunWriter

pytest.importorskip("wandb", reason="the package wandb is not installed: pip install -e '.[wandb]'")

BLOCK = 1 << 15


def chunks(file: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format, after a head of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(file):
        if BLOCK - at % BLOCK < 7:  # no room for the head of a piece: the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", file[at : at + 7])
        record += file[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def records(run_dir: Path) -> list[list[Any]]:
    """What each start left for a later upload, in the order of the starts."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[wandb_internal_pb2.Record.FromString(chunk) for chunk in chunks(file.read_bytes())] for file in files]


def test_a_run_that_goes_on_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    conversation = [{"role": "user", "content": "2 + 2?"}]
    for first, rate in ((1, 1e-3), (3, 1e-4)):
        with RunWriter(tmp_path, wandb={"run_dir": "x", "optim": {"lr": rate}}) as writer:
            writer.samples([{"prompt": conversation, "response": "4", "score": 0.5}], step=first)
            for step in (first, first + 1):
                writer.log({"policy/loss": 0.25 * step}, step=step)
    starts = records(tmp_path)
    assert len(starts) == 2
    identities = {record.run.run_id for start in starts for record in start if record.HasField("run")}
    assert identities == {(tmp_path / "wandb.txt").read_text().strip()}
    for start, rate, steps in zip(starts, (1e-3, 1e-4), ((1, 2), (3, 4)), strict=True):
        told = {update.key: update.value_json for r in start if r.HasField("config") for update in r.config.update}
        assert json.loads(told["optim"]) == {"lr": rate}
        history = [r.history for r in start if r.HasField("history")]
        items = [
            {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in history
        ]
        assert [row["policy/loss"] for row in items if "policy/loss" in row] == [0.25 * step for step in steps]
        assert [row["_step"] for row in items] == list(steps)
        assert items[0]["samples._type"] == "table-file"
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert [table["columns"] for table in tables] == [["prompt", "response", "score"]] * 2
    assert tables[0]["data"] == [[json.dumps(conversation), "4", "0.5"]]
