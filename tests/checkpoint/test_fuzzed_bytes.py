"""Directories damaged at random, through every door: refused in words, or read as if nothing had been done to them."""

from __future__ import annotations

import datetime
import io
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from megarlhf.checkpoint.checksums import CHECKSUMS
from megarlhf.checkpoint.hf_convert import TOKENIZER_FILES, Options, to_hf, to_megatron
from megarlhf.checkpoint.hf_extras import CONFIG, GENERATION
from megarlhf.checkpoint.model_directory import load_model
from megarlhf.data.loader import Loader
from megarlhf.errors import MegarlhfError
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run
from megarlhf.runtime.checks import Model, check_tokenizer, checked_model, resolve_tokenizer
from megarlhf.trainers import sft
from tests.helpers.hostile import Damage, damage, sum_again, within
from tests.helpers.models import blank, whole_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.refusal import write_model

QUIET = Options(progress=False)
ONE = ParallelLayout()
LONGEST_S = 20
ROWS = 64
TEXT = "Eva has 19 shells. How many shells does Eva have?"
HF = ("single", "sharded", "exported")
CASES = {"hf": 200, "model": 250, "state": 80}
"""Some 25 seconds each on an idle core."""

Read = dict[str, Any]
"""What came out of a door, by name."""
Door = Callable[[Path], Read]


class Doors:
    """What is done with a directory of each kind."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self._out, self._mesh = folder / "out", mesh
        self._cfg = settings_of(folder)
        self.of_kind: dict[str, list[tuple[Path, Door]]] = {
            "hf": [(folder / name, door) for name in HF for door in (self.load, self.to_megatron)],
            "model": [(folder / name, door) for name in ("converted", "trained") for door in (self.load, self.to_hf)],
            "state": [(folder / "run", self.resume)],
        }

    def load(self, directory: Path) -> Read:
        """As every command that names a model does."""
        described = checked_model(str(directory), ONE, "model", needs="language")
        model = Model("model", str(directory), described)
        tokenizer = resolve_tokenizer("", model, datetime.date(2024, 7, 26))
        check_tokenizer(tokenizer, described.spec, "model")
        role = blank(described.spec, "language", self._mesh)
        load_model(role, str(directory), seed=1)
        ids = {template: tokenizer.encode_prompt(TEXT, template) for template in ("plain", "chat")}
        return {"description": described, "weights": list(whole_weights(role).values()), "ids": ids}

    def to_megatron(self, directory: Path) -> Read:
        return self._converted(to_megatron, directory)

    def to_hf(self, directory: Path) -> Read:
        return self._converted(to_hf, directory)

    def _converted(self, convert: Callable[..., object], directory: Path) -> Read:
        shutil.rmtree(self._out, ignore_errors=True)
        convert(directory, self._out, QUIET)
        return self.load(self._out)

    def resume(self, directory: Path) -> Read:
        """As a run that goes on, from nonsense to what was saved."""
        cfg, said = self._cfg, io.StringIO()
        assert directory == cfg.run_dir
        cfg.check_run_dir()
        nonsense(role := self._role)
        loader = Loader(ROWS, cfg.global_batch, seed=cfg.seed)
        guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, self._mesh)
        torch.manual_seed(0)
        with redirect_stderr(said):
            step = Run(cfg, {"model": role}, {}, {"data": loader}, guard, self._mesh).restore()
        log = cfg.run_dir / "metrics.jsonl"
        # One that is gone, or empty, is begun anew, and the run says so.
        lost = "metrics.jsonl has lost what it said until then" in said.getvalue()
        with role.resident(*role.parts):
            tensors = {part: [tensor.clone() for tensor in role.tensors(part)] for part in ("weights", "optimizer")}
        groups: Any = role.optimizer.param_groups
        return {
            **tensors,
            "position": (step, loader.state(), guard.skipped, guard.in_a_row),
            "schedule": (role.schedule.state_dict(), [(group["lr"], group.get("step")) for group in groups]),
            "random": [torch.get_rng_state()],
            "log": "lost" if lost else log.read_bytes() if log.exists() else "gone",
        }

    @cached_property
    def _role(self) -> TrainableRole:
        return sft.models(self._cfg, sft.prepare(self._cfg.model_copy(update={"run_dir": self._out})), self._mesh).role


def nonsense(role: TrainableRole) -> None:
    """What a load forgets shows."""
    with role.resident(*role.parts), torch.no_grad():
        for part in role.parts:
            for tensor in role.tensors(part):
                tensor.fill_(0.5)
    role.schedule.num_steps = 0  # Megatron adds what it loads: a run loads once


def settings_of(folder: Path) -> sft.SftConfig:
    return sft.SftConfig.model_validate(
        {
            "run_dir": folder / "given",
            "model": str(folder / "single"),
            "data": {"source": "arithmetic", "template": "plain", "arithmetic": {"level": 1, "rows": ROWS}},
            "global_batch": 16,
            "micro_batch": 16,
            "save_every": 1,
            "epochs": 0.5,
            "tensorboard": False,
        }
    )


def make(folder: Path) -> None:
    """Directories of every kind: those of HF, `converted`, `trained`, and the `run` without its model."""
    write_model(folder / "single")
    write_model(folder / "sharded", shard="200KB")
    to_megatron(folder / "single", folder / "converted", QUIET)
    to_hf(folder / "converted", folder / "exported", Options(progress=False, max_shard_bytes=200_000))
    cfg = settings_of(folder)
    sft.TRAINER.run(cfg, sft.prepare(cfg), [], start(ONE, seed=1))
    shutil.move(cfg.model_dir, folder / "trained")
    shutil.move(cfg.run_dir, folder / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    run_ranks(make, 1, folder)
    return folder


def excused(kind: str, done: Damage, source: Path) -> set[str]:
    """What may come out other than it was, without a word: what nothing in the directory tells from the truth.

    Hugging Face's have no checksums, but for the weights that to-hf has written: a number in the middle of another's
    weight, a setting that describes another Llama or another end, or a tokenizer's file that describes another
    tokenizer, are what the model is.
    """
    if kind != "hf":
        return set()
    if done.file.endswith(".safetensors"):
        summed = (source / CHECKSUMS).is_file()
        return {"weights"} if done.last >= header_of(source / done.file) and not summed else set()
    if done.file in (CONFIG, GENERATION):
        return {"description"}
    return {"ids"} if done.file in TOKENIZER_FILES else set()


def header_of(path: Path) -> int:
    """Bytes before the numbers of a safetensors file."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else 0


def fuzz(folder: Path, kind: str, seed: int, cases: int) -> tuple[Counter[str], list[str]]:
    """Outcomes, and what went wrong, case by case."""
    random, given = Random(f"{kind} {seed}"), folder / "given"
    doors = Doors(folder, start(ONE, seed=1)).of_kind[kind]

    def through(door: Door, source: Path, spoil: Callable[[], object] = int) -> Read:
        shutil.rmtree(given, ignore_errors=True)
        shutil.copytree(source, given)
        spoil()
        with within(LONGEST_S):
            return door(given)

    whole = [through(door, source) for source, door in doors]
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    for _ in range(cases):
        at = random.randrange(len(doors))
        source, door = doors[at]
        # Sums that fit let damage through to what lies behind them; what comes out is then the forger's.
        forged = kind != "hf" and random.random() < 0.5
        done = Damage("", "")

        def spoil(forged: bool = forged) -> None:
            nonlocal done
            done = damage(given, random)
            if forged:
                sum_again(given)

        try:
            found = through(door, source, spoil)
        except MegarlhfError:
            outcomes["refused"] += 1
            continue
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is the fault that is looked for)
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{door.__name__}, {done}{forged=}: {type(error).__name__} {error} ({where})"[:600])
            continue
        outcomes["read"] += 1
        other = {name for name in found if not same(found[name], whole[at][name])}
        other -= set(found) if forged else excused(kind, done, source)
        if other:
            faults.append(f"{door.__name__}, {done}: was read, and {', '.join(sorted(other))} changed")
    return outcomes, faults


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    return ours == theirs or (ours == "lost")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
def test_damage_is_refused_in_words_or_changes_nothing(kind: str, seed: int, folder: Path) -> None:
    outcomes, faults = run_ranks(fuzz, 1, folder, kind, seed, CASES[kind])[0]
    assert not faults, "\n".join(faults)
    assert min(outcomes["refused"], outcomes["read"]) > 3, outcomes
