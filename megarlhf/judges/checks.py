"""Judges that mean nothing together, or with how is learnt from them: refused before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megarlhf.errors import ConfigError
from megarlhf.judges import JudgeSettings
from megarlhf.judges.judge import NAME
from megarlhf.judges.process_model import rewarding_steps
from megarlhf.judges.shaping import ShapingConfig

_ROLES = ("actor", "critic", "reference")


def check_judges(judges: Mapping[str, JudgeSettings], reward_init: str) -> None:
    """Raise ConfigError where there is none, none counts, or a name is taken. reward_init: of the short form."""
    if not judges and not reward_init:
        raise ConfigError(
            "no judge: nothing would score the responses; set reward.init to a reward model, or name a judge, as "
            "in judges.answer.kind=rule judges.answer.rule=maths."
        )
    if reward_init and "reward" in judges:
        raise ConfigError("reward.init and judges.reward are two judges of one name; give one of the two.")
    for name in judges:
        check_name(name, _ROLES)
    if not reward_init and not any(judge.weight for judge in judges.values()):
        raise ConfigError("every judge has weight 0, so that all scores are 0; give one of them another weight.")


def check_name(name: str, taken: Sequence[str] = ()) -> None:
    """Raise ConfigError where a judge may not be called so; taken: names that mean something else there."""
    if name in taken or not re.fullmatch(NAME, name):
        form = f", begins with a letter, and is none of {', '.join(taken)}" if taken else ", and begins with a letter"
        raise ConfigError(f"judges.{name}: a judge's name is of small letters, digits and _{form}; choose another.")


def check_step_rewards(judges: Mapping[str, JudgeSettings], shaping: ShapingConfig, *, learnt: bool) -> None:
    """Raise ConfigError where a judge rewards steps, and that would be lost; learnt: whether rewards of tokens are."""
    for name, judge in rewarding_steps(judges).items():
        setting, one = f"judges.{name}.reward", "to min, product, mean or last, which give a response one score"
        if not learnt:
            raise ConfigError(
                f"{setting}={judge.reward} rewards each step, but here a response has one advantage, by one score; set "
                f"it {one}, or take ppo, or reinforce with baseline=none or baseline=token."
            )
        if shaping.transforms:
            raise ConfigError(
                f"{', '.join(shaping.transforms)} with {setting}={judge.reward}: what is made of a response's score "
                "says nothing of its steps, and the difference would fall on its last token, whichever earned it; "
                f"leave it out, or set {setting} {one}."
            )
