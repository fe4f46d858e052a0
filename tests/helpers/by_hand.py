"""Imports the examples in plain torch, whose names start with a digit."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def load_by_hand(name: str = "00_ppo_by_hand") -> ModuleType:
    """An example as a module: an algorithm in plain torch, the oracle of the library's step."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.lstrip("0123456789_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
