"""What Python programs import: the settings of every stage, and `run`, which does what the command line does with them.

docs/python.md shows each stage. Other modules are the library's own, and may change.
"""

from __future__ import annotations

import json

from megarlhf.commands.convert import ConvertConfig
from megarlhf.commands.evaluate import EvalConfig
from megarlhf.commands.evaluate_pool import EvalPoolConfig
from megarlhf.commands.evaluate_reward import EvalRewardConfig
from megarlhf.commands.generate import GenerateConfig
from megarlhf.commands.judge import PoolJudgesConfig
from megarlhf.commands.label_steps import LabelStepsConfig
from megarlhf.commands.rows import RowsConfig
from megarlhf.commands.score import ScoreConfig
from megarlhf.commands.table import COMMANDS, Command, program
from megarlhf.config import Config, load_config
from megarlhf.data.judged_steps import StepData
from megarlhf.data.preferences import LabelledData
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import SftData
from megarlhf.errors import DONE, STOPPED, MegarlhfError, RunFinished, RunStopped, TrainingError, complain
from megarlhf.judges.function import FunctionConfig
from megarlhf.judges.process_model import ProcessJudgeConfig
from megarlhf.judges.rules import RuleConfig
from megarlhf.models.lora import LoraConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.trainers.dpo import DPOConfig
from megarlhf.trainers.grpo import GRPOConfig
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.process_reward import ProcessRewardConfig
from megarlhf.trainers.reward import RewardConfig
from megarlhf.trainers.role_config import FrozenConfig, LearnerConfig
from megarlhf.trainers.sft import SftConfig

__all__ = [
    "ConvertConfig",
    "DPOConfig",
    "DataConfig",
    "EvalConfig",
    "EvalPoolConfig",
    "EvalRewardConfig",
    "FrozenConfig",
    "FunctionConfig",
    "GRPOConfig",
    "GenerateConfig",
    "LabelStepsConfig",
    "LabelledData",
    "LearnerConfig",
    "LoraConfig",
    "MegarlhfError",
    "OptimConfig",
    "PPOConfig",
    "ParallelLayout",
    "PoolJudgesConfig",
    "ProcessJudgeConfig",
    "ProcessRewardConfig",
    "RewardConfig",
    "RowsConfig",
    "RuleConfig",
    "SamplingConfig",
    "ScoreConfig",
    "SftConfig",
    "SftData",
    "StepData",
    "load_config",
    "run",
]


def run(cfg: Config) -> None:
    """Do what the command whose settings these are does: `run(SftConfig(...))` is `megarlhf sft ...`.

    A run that is done already is left as it is, with a word on standard error.

    Ranks:    of cfg.layout. One is this process; several are processes that are started here and end with the call,
              from a script as from a notebook. Under torchrun or srun every rank calls it.
    Raises:   MegarlhfError that says what to change, before anything is built; TrainingError where a run failed,
              RunStopped where a signal ended it and the same call goes on.
    """
    name = _name(type(cfg))
    _, entry = program(COMMANDS.get(name, Command("", trainer=name)))
    try:
        code = entry(cfg, [*name.split(), *_words(cfg)])
    except RunFinished as finished:
        complain(str(finished))
        return
    if code == STOPPED:
        raise RunStopped(f"megarlhf {name} was stopped; run the same settings again to go on.")
    if code != DONE:
        raise TrainingError(f"megarlhf {name} ended with exit code {code}; what it said on standard error is why.")


def _name(settings: type[Config]) -> str:
    """The command that takes these settings: one of the package's, or the module of a trainer of the user's own."""
    place = f"{settings.__module__}:{settings.__name__}"
    trainer = settings.__module__.removeprefix("megarlhf.trainers.")
    return next((name for name, command in COMMANDS.items() if command.settings == place), trainer)


def _words(cfg: Config) -> list[str]:
    """The settings that differ from their defaults as the command line has them; groups whole."""
    values = cfg.model_dump(mode="json")
    usual = {name: field.get_default(call_default_factory=True) for name, field in type(cfg).model_fields.items()}
    return [f"{name}={json.dumps(values[name])}" for name, value in dict(cfg).items() if value != usual[name]]
