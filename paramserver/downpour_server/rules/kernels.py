"""torch's fused kernels called directly: what ``Optimizer.step`` comes to for one parameter, without the way there.

For a small chunk the way costs several times what the kernel does. The optimizer stays the owner of its options and
state; what is not exactly the usual case (a first step, state that an option has just made necessary) is left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_ONE = torch.ones(())
"""A number would be made a tensor at each update, which costs more than the sum."""
Update = Callable[[Tensor, Tensor], None]
"""Takes flat weights, changed in place, and the gradient, left as it is."""
Maker = Callable[[dict[str, Any], dict[str, Any]], Update]
"""Takes the optimizer's group and the parameter's state; :class:`KeyError` where the state is not complete."""


def update_of(optimizer: Optimizer, parameter: Tensor) -> Update | None:
    """The kernel for the options and the state as they are now; None where only ``optimizer.step`` will do."""
    make, group = _MAKERS.get(type(optimizer)), optimizer.param_groups[0]
    if make is None or not group.get("fused"):
        return None
    try:
        return make(group, optimizer.state.get(parameter, {}))
    except KeyError:
        return None


def _sgd(group: dict[str, Any], state: dict[str, Any]) -> Update:
    buffers = [] if group["momentum"] == 0 else [state["momentum_buffer"]]
    options = {name: group[name] for name in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}

    def update(weights: Tensor, gradient: Tensor) -> None:
        torch._fused_sgd_([weights], [gradient], buffers, **options, is_first_step=False)

    return update


def _adam(group: dict[str, Any], state: dict[str, Any]) -> Update:
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    step, averages, squares = state["step"], [state["exp_avg"]], [state["exp_avg_sq"]]
    largest, steps = [state["max_exp_avg_sq"]] if group["amsgrad"] else [], [step]
    options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    options["beta1"], options["beta2"] = group["betas"]

    def update(weights: Tensor, gradient: Tensor) -> None:
        step.add_(_ONE)
        kernel([weights], [gradient], averages, squares, largest, steps, **options)

    return update


def _adagrad(group: dict[str, Any], state: dict[str, Any]) -> Update:
    step, sums = state["step"], [state["sum"]]
    steps = [step]
    options = {name: group[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize")}

    def update(weights: Tensor, gradient: Tensor) -> None:
        step.add_(_ONE)
        torch._fused_adagrad_([weights], [gradient], sums, steps, **options)

    return update


_MAKERS: dict[type[Optimizer], Maker] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adagrad: _adagrad,
}
