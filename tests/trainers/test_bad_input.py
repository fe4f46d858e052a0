"""Each bad input stops before a model is built: exit code 2, one message with the setting, the values, the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.refusal import DPO, EVAL, GENERATE, PPO, REWARD, SFT, ModelWasBuiltError, assert_matches, write_model


@pytest.mark.parametrize("command", [SFT, REWARD, DPO, PPO, GENERATE], ids=lambda command: command[0])
def test_the_good_input_that_the_cases_spoil_gets_as_far_as_the_model(
    command: tuple[str, ...], refused: Callable[..., str]
) -> None:
    with pytest.raises(ModelWasBuiltError):
        refused(command)


@pytest.mark.parametrize("command", [GENERATE, EVAL], ids=lambda command: command[0])
def test_an_output_that_is_there_is_kept(command: tuple[str, ...], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("work")
    assert_matches(
        refused(command, "output=there.jsonl"), "output=there.jsonl exists.*; choose another file, or remove"
    )
    assert (tmp_path / "there.jsonl").read_text() == "work"


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        (SFT, "wandb=true", "wandb=true: the package wandb is missing; pip install"),
        (PPO, "kl_cof=0.1", "unknown setting kl_cof = 0.1 .*did you mean kl_coef?"),
        (PPO, "actor.optim.lrr=1", "unknown setting actor.optim.lrr = 1 .*did you mean actor.optim.lr?"),
        (PPO, "tensor=2", "unknown setting tensor = 2 .*did you mean layout.tensor?"),
        (SFT, "global_batch=many", "setting global_batch = 'many': .*; give int >= 1"),
        (SFT, "epochs=-1", "setting epochs = -1: .*greater than 0; give float > 0"),
        (DPO, "beta=0", "setting beta = 0: .*greater than 0; give float > 0"),
        (DPO, "label_smoothing=0.5", "setting label_smoothing = 0.5: .*less than 0.5; give float >= 0, < 0.5"),
        (DPO, "label_smoothing=-0.1", "setting label_smoothing = -0.1: .*; give float >= 0, < 0.5"),
    ],
)
def test_settings(command: tuple[str, ...], override: str, message: str, refused: Callable[..., str]) -> None:
    assert_matches(refused(command, override), message)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (SFT, ["layout.tensor=8"], "model heads=4 is not divisible by layout.tensor=8; choose a layout.tensor that"),
        (SFT, ["layout.tensor=4"], "model query groups=2 is not divisible by layout.tensor=4; choose"),
        (SFT, ["layout.pipeline=5"], "model layers=4 is not divisible by layout.pipeline=5; choose"),
        (
            PPO,
            ["critic.init=odd", "layout.tensor=2"],
            "critic.init ffn_size=99 is not divisible by layout.tensor=2; choose",
        ),
        (PPO, ["layout.tensor=8"], "actor.init heads=4 is not divisible by layout.tensor=8; choose"),
        (
            SFT,
            ["layout.virtual_pipeline=2"],
            "layout.virtual_pipeline=2 needs .* layout.pipeline=1; set layout",
        ),
        (SFT, ["layout.sequence_parallel=true"], "layout.sequence_parallel=true .* layout.tensor=1; set layout.tensor"),
        (
            PPO,
            ["layout.virtual_pipeline=2", "layout.pipeline=2"],
            "layout.virtual_pipeline=2 cannot roll out: .*; set layout.virtual_pipeline=1",
        ),
        (
            PPO,
            ["layout.context=2", "layout.tensor=2", "rollout.layout.tensor=1", "rollout.layout.data=2"],
            "rollout.layout is of 2 ranks .* but layout is of 4, .*rollout.layout.tensor=1 rollout.layout.data=4 or ",
        ),
    ],
)
def test_layouts(
    command: tuple[str, ...], overrides: list[str], message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write_model(tmp_path / "odd", ffn_size=99)
    assert_matches(refused(command, *overrides), message)


@pytest.mark.parametrize("ranks", ["1", "3", "8"])
def test_rank_counts(ranks: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    said = refused(PPO, "layout.tensor=2", "layout.data=2")
    assert_matches(said, f"layout needs 4 ranks (tensor 2 x pipeline 1 x data 2) but {ranks} were started; .*start 4")
    said = refused(PPO, "layout.context=2", "layout.data=2")
    assert_matches(said, f"layout needs 4 ranks .* x context 2 x data 2) but {ranks} were started; .*start 4")


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (SFT, ["layout.data=3"], "global_batch=16 does not divide over layout.data=3 ranks; use a multiple of 3"),
        (
            SFT,
            ["micro_batch=5"],
            "global_batch=16 is 16 rows a data rank, .* micro_batch=5; set micro_batch to a",
        ),
        (
            SFT,
            ["global_batch=128"],
            "global_batch=128 is more than the 64 rows of data; lower global_batch to",
        ),
        (
            SFT,
            ["optim.warmup_steps=4"],
            "optim.warmup_steps=4 is not less than the run's 4 optimiser steps; set .*4",
        ),
        (SFT, ["optim.min_lr=1"], "optim.min_lr=1.0 exceeds optim.lr=1e-05; lower optim.min_lr"),
        (REWARD, ["labelled_batch=15"], "labelled_batch=15 is odd; .*use an even number"),
        (
            REWARD,
            ["labelled_batch=128"],
            "labelled_batch=128 is more than the 64 rows of labelled; lower labelled",
        ),
        (REWARD, ["labelled=null"], "pairs and labelled are both unset; set pairs.source or labelled.source"),
        (DPO, ["layout.data=3"], "global_batch=16 does not divide over layout.data=3 ranks; use a multiple of 3"),
        (
            DPO,
            ["global_batch=128"],
            "global_batch=128 is more than the .* rows of pairs; lower global_batch to at most",
        ),
        (PPO, ["group_size=3"], "rollout_batch=16 is not divisible by group_size=3; change"),
        (PPO, ["global_batch=12"], "rollout_batch=16 is not divisible by global_batch=12; change"),
        (PPO, ["micro_batch=3"], "global_batch=16 is 16 rows a data rank, .* micro_batch=3; set"),
        (
            PPO,
            ["prompts.arithmetic.rows=15"],
            "15 prompts, 16 needed an iteration; add prompts, or lower rollout_batch",
        ),
        (
            PPO,
            ["sampling.temperature=0"],
            "sampling.temperature=0 always draws the same .*; set it above 0",
        ),
        (
            PPO,
            ["sampling.max_new_tokens=400"],
            "sampling.max_new_tokens=400 after prompts of up to .* tokens exceeds",
        ),
        (
            GENERATE,
            ["sampling.max_new_tokens=256"],
            "the context of model, 256 tokens; set sampling.max_new_tokens",
        ),
        (
            PPO,
            ["actor.optim.warmup_steps=8"],
            "actor.optim.warmup_steps=8 is not less than the run's 8 .*; set .*8",
        ),
        (PPO, ["critic.optim.warmup_steps=9"], "critic.optim.warmup_steps=9 is not less than the run's 8 .*; set"),
        (
            PPO,
            ["value_warmup_iterations=2"],
            "value_warmup_iterations=2 leaves none of the iterations=2 .*; set .*2",
        ),
    ],
)
def test_numbers(command: tuple[str, ...], overrides: list[str], message: str, refused: Callable[..., str]) -> None:
    assert_matches(refused(command, *overrides), message)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (SFT, ["micro_batch_tokens=0"], "setting micro_batch_tokens = 0: .*greater than or equal to 1"),
        (
            SFT,
            ["micro_batch_tokens=16"],
            "a row of data has up to .* tokens, .*micro_batch_tokens=16; set it to .*, or to null",
        ),
        (
            PPO,
            ["micro_batch_tokens=16"],
            "a prompt with its response has up to .* tokens, .*micro_batch_tokens=16; set it",
        ),
        (DPO, ["micro_batch_tokens=16"], "a pair of pairs has up to .* tokens, .* micro_batch_tokens=16; set it to"),
        (
            REWARD,
            ["micro_batch_tokens=16", "pairs.source=arithmetic", "labelled=null"],
            "a pair of pairs has up to .* tokens, .* micro_batch_tokens=16; set it to",
        ),
        (
            REWARD,
            ["micro_batch_tokens=16"],
            "a couple of rows of labelled has up to .* tokens, .*micro_batch_tokens=16; set it to",
        ),
        (
            SFT,
            ["layout.tensor=2", "layout.sequence_parallel=true", "micro_batch_tokens=511"],
            "micro_batch_tokens=511 is not a multiple of 2, as layout.tensor=2 with .* needs; set it to 510 or 512",
        ),
        (
            SFT,
            ["layout.context=3", "micro_batch_tokens=512"],
            "micro_batch_tokens=512 is not a multiple of 6, as layout.context=3 needs; set it to 510 or 516",
        ),
        (
            PPO,
            ["compute.fp8=hybrid", "micro_batch_tokens=1000"],
            "micro_batch_tokens=1000 is not a multiple of 16, as compute.fp8 needs; set it to 992 or 1008",
        ),
        (
            SFT,
            ["layout.pipeline=2", "layout.virtual_pipeline=2", "layout.data=16", "micro_batch_tokens=512"],
            "global_batch=16 is 1 rows a data rank, too few .*layout.pipeline=2 stages; use at least 32",
        ),
    ],
)
def test_budgets(command: tuple[str, ...], overrides: list[str], message: str, refused: Callable[..., str]) -> None:
    assert_matches(refused(command, *overrides), message)
