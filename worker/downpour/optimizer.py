"""The user's own optimizer object, taught to push and pull.

It stays the same object, because learning-rate schedulers and gradient scalers hold on to it: only its class is
replaced by a subclass of its class. ``param_groups`` stay the place where hyper-parameters are read and changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from downpour import scaler
from downpour_common.errors import ModelError


class Stepper(Protocol):
    """Who carries out what the optimizer is asked."""

    def step(self, local_step: Callable[[], None], skipped: bool = False) -> None:
        """Push and pull as the mode says; ``local_step`` runs the optimizer's own step on this worker's weights.

        ``skipped``: a gradient scaler does without this step; it counts, and contributes nothing.
        """

    def zero_gradients(self) -> None:
        """Zero the gradients of the trainable parameters."""


def adopt(optimizer: torch.optim.Optimizer, stepper: Stepper) -> None:
    """Make ``optimizer`` hand its steps to ``stepper``."""
    original = type(optimizer)
    own_step = inspect.unwrap(original.step)

    def local_step() -> None:
        with torch.no_grad():
            own_step(optimizer)

    def step(self: Any, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ModelError(
                "optimizer.step(closure) cannot be distributed; "
                "compute the loss and call loss.backward() before optimizer.step()"
            )
        self._opt_called = True  # what a scheduler made before prepare looks at
        stepper.step(local_step, scaler.take(self))

    def zero_grad(self: Any, set_to_none: bool = True) -> None:  # noqa: ARG001
        stepper.zero_gradients()

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:  # noqa: ARG001
        raise ModelError(
            "add_param_group after downpour.prepare: the servers hold the groups they got; add them before"
        )

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    adopted = type(
        original.__name__, (original,), {"step": step, "zero_grad": zero_grad, "add_param_group": add_param_group}
    )
    optimizer.__dict__.pop("step", None)  # a scheduler's wrapper around the original
    optimizer.__class__ = adopted
    optimizer._patch_step_function()  # step hooks and the profiler's name, as __init__ does
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # so it is called for skipped steps, too
