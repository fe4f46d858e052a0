"""An optimiser step looks at numbers on the device once: a GPU that is waited for has nothing to do meanwhile."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import language_model, learner, score_model, settings
from tests.helpers.ranks import run_ranks
from tests.trainers.test_splits import lessons, sft_batch

WAITS = {
    *("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "__array__"),
    *("any", "all", "nonzero", "masked_select", "unique", "unique_consecutive", "allclose", "equal"),
}
"""What must wait for a device before it can go on; so must indexing by a mask. (`any` and `all` are read by `if`.)"""
ON_THE_HOST = (
    "cpu, role.py:_begin",  # the batch waits on the host, and the positions to read with it
    "cpu, micro_batches.py:split",
    "tolist, base.py:_numbers",  # which rows: decided on the host
    "nonzero, transformer.py:_forward_mlp",  # for a CPU alone
)
"""Whatever the device is."""
OURS = ("/megarlhf/", "/megarlhf_kernels/")


class Waits(TorchFunctionMode):
    """Counts them where our own code asks for them, whatever device the tensor is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name in WAITS or (name == "__getitem__" and masks(args[1])):
            caller = sys._getframe(1)
            if any(part in caller.f_code.co_filename for part in OURS):
                self.seen[f"{name}, {Path(caller.f_code.co_filename).name}:{caller.f_code.co_name}"] += 1
        return func(*args, **(kwargs or {}))


def masks(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def count(language: str, scalar: str, cut: Cut) -> dict[str, Counter[str]]:
    """One update of each learner, of 8 micro-batches at most."""
    mesh = start(ParallelLayout(), seed=1)
    cfg = PPOConfig.model_validate({"run_dir": "unused"})
    composed = cfg.model_copy(update={"policy_loss": "composed"})
    shared, optim = settings(mesh, cut), OptimConfig()

    def of(role: TrainableRole, batch: Any, loss: Any) -> Counter[str]:
        role.update(batch, loss)  # the first step allocates the optimiser's state
        with Waits() as waits:
            role.update(batch, loss)
        return waits.seen

    actor = learner(language, LabelLogprobs(0.7), shared, mesh, optim)
    critic = learner(scalar, PositionValues(), shared, mesh, optim)
    return {
        "policy, fused": of(actor, lessons(0)[0], policy_loss(actor, cfg)),
        "policy, composed": of(actor, lessons(0)[0], policy_loss(actor, composed)),
        "value": of(critic, lessons(0)[1], value_loss(critic, cfg)),
        "sft": of(actor, sft_batch(0), next_token_loss(actor)),
    }


@pytest.mark.parametrize("cut", [InRows(1), InTokens(23)], ids=str)
def test_an_update_of_up_to_8_micro_batches_waits_once(cut: Cut, tmp_path: Path) -> None:
    language_model(tmp_path / "language", seed=1)
    score_model(tmp_path / "scalar", seed=3)
    (found,) = run_ranks(count, 1, str(tmp_path / "language"), str(tmp_path / "scalar"), cut)
    for learner_name, waits in found.items():
        assert waits - Counter(dict.fromkeys(ON_THE_HOST, 8)) == {"tolist, pipeline.py:_means": 1}, learner_name


@pytest.mark.parametrize("look", [float, bool, torch.Tensor.item, torch.Tensor.tolist, lambda x: x[x > 0]])
def test_waits_are_seen(look: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def look_at(x: torch.Tensor) -> Any:
        return look(x)

    monkeypatch.setattr(sys.modules[__name__], "OURS", ("test_host_waits",))
    with Waits() as waits:
        look_at(torch.ones(1))
    assert sum(waits.seen.values()) >= 1
