"""A capsule may come from somebody else: what its settings name is not run unless one says that one knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarlhf.commands import replay
from megarlhf.errors import DataError
from megarlhf.runs.capsule import Note
from megarlhf.trainers.find import trainer_named


def note(config: str) -> Note:
    said = {"reason": "", "where": "step 3", "step": 2, "role": "actor", "collective": "", "rank": 0, "part": 0}
    more = {"world_size": 1, "attempt": "", "trainer": "megarlhf.trainers.ppo", "kind": "PolicyRows"}
    return Note.model_validate({**said, **more, "texts": {}, "command": "", "config": config})


def test_a_function_in_its_settings_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("raise SystemExit('it was run')\n")
    theirs = f"judges: {{own: {{kind: function, function: '{tmp_path}/theirs.py:f'}}}}\n"
    nobody: Any = None  # it is refused before there is anything to build models on
    says = (
        rf"capsule=there: its settings name judges.own.function={tmp_path}/theirs.py:f, which would be run; .* trainer="
    )
    with pytest.raises(DataError, match=says):
        replay._role(Path("there"), note(theirs), trainer_named("ppo"), nobody, named=False)
