"""Stands in for transformer_engine.pytorch.optimizers: see `engine_stand_in`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled decay; like TE's it knows the names of its own state and raises KeyError at any other."""

    NAMES = ("exp_avg", "exp_avg_sq", "master_param")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        **rest: Any,
    ) -> None:
        assert adam_w_mode
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for values in state["state"].values():
            self._check(values)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, values in self.state.items():
            self._check(values)
            self.state[parameter] = {name: value.float().clone() for name, value in values.items()}

    def _check(self, values: dict[str, Any]) -> None:
        for name in values:
            if name not in self.NAMES:
                raise KeyError(name)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        (beta1, beta2), gradient = group["betas"], parameter.grad
        assert gradient is not None
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        one = state["exp_avg"] / (1 - beta1 ** group["step"])
        two = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * one / (two.sqrt() + group["eps"]))


def multi_tensor_applier(operation: Callable[..., Any], flag: Tensor, tensors: list[Any], *rest: Any) -> Any:
    return operation(2048, flag, tensors, *rest)


def multi_tensor_l2norm(_chunk: int, _flag: Tensor, tensors: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    return torch.stack([tensor.float().norm() for tensor in tensors[0]]).norm(), None


def multi_tensor_scale(_chunk: int, _flag: Tensor, tensors: list[list[Tensor]], scale: Any) -> None:
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)
