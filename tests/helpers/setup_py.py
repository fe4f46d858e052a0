"""The requirements that setup.py declares, read without running it."""

from __future__ import annotations

import ast
from pathlib import Path


def declared(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """REQUIRES and EXTRAS."""
    values = {
        target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in ("REQUIRES", "EXTRAS")
    }
    return values["REQUIRES"], values["EXTRAS"]
