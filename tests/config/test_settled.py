"""Settings beside their defaults, as a page shows them: groups, groups that may be left out, kinds, and mappings."""

from __future__ import annotations

from megarlhf.config.settled import settled
from megarlhf.trainers.grpo import TRAINER as GRPO
from megarlhf.trainers.reward import RewardConfig


def differing(cfg) -> dict[str, tuple[str, str]]:
    return {each.name: (each.value, each.default) for each in settled(cfg) if each.differs}


def test_only_what_was_chosen_differs() -> None:
    plain = RewardConfig.model_validate({"run_dir": "runs/a"})
    assert differing(plain) == {"run_dir": ("runs/a", "required")}
    chosen = {"pairs": {"source": "a.jsonl", "columns": {"prompt": "question"}}, "optim": {"lr": 2e-5}, "wandb": True}
    assert differing(RewardConfig.model_validate({"run_dir": "runs/a", **chosen, "seed": 1, "epochs": 1.0})) == {
        "run_dir": ("runs/a", "required"),
        "wandb": ("true", "false"),
        "pairs.source": ("a.jsonl", '""'),
        "pairs.columns.prompt": ("question", "not set"),
        "optim.lr": ("2e-05", RewardConfig.model_fields["optim"].default.lr.__format__(".12g")),
    }


def test_a_group_has_the_defaults_that_its_owner_gives_it_and_a_judge_those_of_its_kind() -> None:
    cfg = GRPO.config.model_validate(
        {"run_dir": "a", "judges": {"answer": {"kind": "rule", "rule": "maths", "weight": 2.0}}, "group_size": 4}
    )
    differs = differing(cfg)
    assert differs["judges.answer.weight"] == ("2", "1")
    assert differs["judges.answer.rule"] == ("maths", "required")
    assert differs.keys() == {
        "run_dir",
        "judges.answer.weight",
        "judges.answer.kind",
        "judges.answer.rule",
        "group_size",
    }
    # Every setting is there once, the same with all of its defaults.
    names = [each.name for each in settled(cfg)]
    assert len(names) == len(set(names)) > 80
