"""Imports `examples/00_ppo_by_hand.py`, whose name starts with a digit."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def load_by_hand() -> ModuleType:
    """The example as a module: PPO in plain torch, the oracle of the library's PPO step."""
    path = Path(__file__).parents[2] / "examples" / "00_ppo_by_hand.py"
    spec = importlib.util.spec_from_file_location("ppo_by_hand", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
