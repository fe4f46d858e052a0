"""What tests of refused input share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.models import role
from tests.helpers.refusal import ModelWasBuiltError

RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; return the one line it printed."""

    def built(*_args: object, **_options: object) -> None:
        raise ModelWasBuiltError

    monkeypatch.setattr(role, "build_chunks", built)
    monkeypatch.chdir(tmp_path)
    for name in RANKED:
        monkeypatch.delenv(name, raising=False)

    def refused(command: tuple[str, ...], *overrides: str) -> str:
        run_dir = [] if command[0] in ("generate", "eval", "score") else ["run_dir=run"]
        capfd.readouterr()
        assert cli.main([*command, *run_dir, *overrides]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert not Path("run/metrics.jsonl").exists()
        return said.err

    return refused
