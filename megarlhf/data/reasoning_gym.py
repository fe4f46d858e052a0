"""Prompts of the package reasoning-gym, which makes problems of a hundred kinds and has a verifier for each.

Here alone it is imported. What a policy writes reaches its verifiers, which were not written to be attacked: of one
version each `score_answer` was read, not every helper that it calls, and tried with odd answers. Those that were found
to evaluate an answer, or to be kept busy or fooled by one, are refused by name.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pydantic

from megarlhf.config import Config
from megarlhf.data.arithmetic import HELDOUT_EVERY, Split
from megarlhf.errors import ConfigError

PREFIX = "reasoning_gym:"
"""Of a source: `reasoning_gym:leg_counting`."""
VERSION = "0.1.25"
"""Whose verifiers were read."""
_SPAN = 1 << 24
"""Problems that a seed has to itself."""
_CHUNK = 1024
"""Problems drawn from one data set; some tasks make as many as they are asked for at once."""
_BARREN = 20_000
"""Draws without a new problem after which a task counts as exhausted."""

_EVALUATED = "its verifier evaluates what the policy wrote as Python"
_BUSY = "an answer of a few letters keeps its verifier busy, or fills the memory"
_VARIES = "its problems differ from one process to the next, and ranks must see the same"
REFUSED = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), f"{_EVALUATED}, by eval"),
    **dict.fromkeys(
        ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
        f"{_EVALUATED}, by sympy's parse_expr",
    ),
    **dict.fromkeys(("coin_flip", "propositional_logic", "rubiks_cube", "rush_hour"), _BUSY),
    **dict.fromkeys(
        ("codeio", "isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"), _VARIES
    ),
    "complex_arithmetic": "its verifier takes nan for every answer",
    "number_sorting": "its verifier takes a list of NaN for every answer",
    "game_of_life_halting": "its verifier takes anything for the answer",
    "composite": "it is made of other tasks",
}
"""Tasks that are not offered, and why."""


class ReasoningGymConfig(Config):
    """What reasoning-gym generates. The same settings give the same rows on every machine."""

    rows: int = pydantic.Field(default=4000, ge=1, le=1_000_000)
    """Distinct problems to generate."""
    seed: int = pydantic.Field(default=1, ge=0, le=255)
    """Seed of the problems; give each stage of a pipeline its own. Tasks draw by numbers up to 2^32, of which each seed
    has 2^24 to itself."""
    parameters: dict[str, Any] = pydantic.Field(default={})
    """Of the task's generator, by its own names: `parameters.max_animals=20`."""
    instruction: str = "Write the final answer between <answer> and </answer>."
    """Added below each problem; empty adds nothing."""


def is_task(source: str) -> bool:
    """Whether `source` names a task of reasoning-gym."""
    return source.startswith(PREFIX)


def task_rows(source: str, config: ReasoningGymConfig, split: Split) -> list[dict[str, Any]]:
    """Rows {prompt, answer, question, metadata, task, parameters}, no problem twice and none in both splits.

    A problem is held out by a hash of its text, one in eight, whatever the seed: none that was trained on is tested.
    Raises:   ConfigError where the package, the task or a parameter is not there, or problems run out.
    """
    name = source.removeprefix(PREFIX)
    found: dict[str, dict[str, Any]] = {}
    barren = 0
    for problem in _problems(name, config):
        question, barren = problem["question"], barren + 1
        if question not in found and _split(question) == split:
            found[question] = {
                "prompt": f"{question}\n\n{config.instruction}" if config.instruction else question,
                "answer": problem["answer"],
                "question": question,
                "metadata": problem["metadata"],
                "task": name,
                "parameters": config.parameters,
            }
            barren = 0
        if len(found) == config.rows:
            break
        if barren == _BARREN:
            raise ConfigError(
                f"reasoning_gym.rows={config.rows}: {name} has about {len(found)} distinct {split} problems; ask for "
                "fewer, or change reasoning_gym.parameters."
            )
    return list(found.values())


def task(name: str, parameters: Mapping[str, Any], seed: int = 0, size: int = 1) -> Any:
    """The package's own data set of a task, which makes problems and scores answers; it has no types.

    Raises:   ConfigError where the package, the task or a parameter is not there, or the task is refused.
    """
    factory = _package()
    if name in REFUSED:
        raise ConfigError(f"source={PREFIX}{name}: {REFUSED[name]}; choose another task.")
    if name not in factory.DATASETS:
        close = difflib.get_close_matches(name, factory.DATASETS.keys() - REFUSED.keys(), n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "leg_counting is one, chain_sum another."
        raise ConfigError(f"source={PREFIX}{name}: reasoning-gym has no such task; {remedy}")
    try:
        return factory.create_dataset(name, seed=seed, size=size, **parameters)
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"reasoning_gym.parameters={dict(parameters)}: {name} refuses them ({reason}).") from None


def _package() -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError(f"{PREFIX} needs the package reasoning-gym; pip install 'megarlhf[tasks]'.")
    there = importlib.metadata.version("reasoning-gym")
    if there != VERSION:
        raise ConfigError(
            f"{PREFIX} reasoning-gym {there} is installed, and the verifiers of {VERSION} were read for what they do "
            f"with an answer; pip install reasoning-gym=={VERSION}."
        )
    importlib.import_module("reasoning_gym")  # names its tasks to the factory
    return importlib.import_module("reasoning_gym.factory")


def _problems(name: str, config: ReasoningGymConfig) -> Iterator[dict[str, Any]]:
    """Problem number n of a seed is drawn by a number of its own, that no other seed has."""
    for start in range(config.seed * _SPAN, (config.seed + 1) * _SPAN, _CHUNK):
        part = task(name, config.parameters, start, _CHUNK)
        for index in range(_CHUNK):
            with redirect_stdout(StringIO()):  # bf prints what its programs do, in between rows that a command writes
                problem = part[index]
            yield problem


def _split(question: str) -> Split:
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % HELDOUT_EVERY
    return "heldout" if bucket == 0 else "train"
