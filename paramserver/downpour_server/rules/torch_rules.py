"""Optimizer classes as update rules: one instance per chunk, fused where torch has it for CPUs.

Most act element by element, so an optimizer over a slice of the flat vector does exactly what it would do to the
tensors in it (fused kernels round differently in the last bit). Those that look at whole tensors are given chunks that
are one, in its shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from downpour_common.optimizers import IMPLEMENTATION_OPTIONS
from downpour_common.rules import optimizer_class
from downpour_server.rules.kernels import Update, update_of

_FULL = frozenset({torch.float32, torch.float64})
_FULL_AND_HALF = _FULL | {torch.float16, torch.bfloat16}
_NEVER: frozenset[torch.dtype] = frozenset()


class TorchRule:
    """A :class:`downpour_server.rules.Rule` around one optimizer class. ``shape``: of the whole tensor that the chunk
    is; None: the rule sees the chunk as it is, flat."""

    def __init__(
        self,
        optimizer: type[Optimizer],
        fused: frozenset[torch.dtype],
        options: Mapping[str, Any],
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self._class = optimizer
        self._step = inspect.unwrap(optimizer.step)  # without hooks and profiling, which cost more than small updates
        self._fused = fused
        self._options = _usable(options)
        self._shape = shape
        self._weights: torch.nn.Parameter | None = None
        self._optimizer: Optimizer | None = None
        self._update: Update | None = None

    def _bound_to(self, weights: torch.Tensor) -> tuple[torch.nn.Parameter, Optimizer]:
        if self._weights is None or self._optimizer is None:
            self._weights = torch.nn.Parameter(self._shaped(weights))
            options = dict(self._options)
            if weights.dtype in self._fused:
                options["fused"] = True
            # Options that __init__ does not take (initial_lr of a scheduler) are set on the group afterwards.
            self._optimizer = self._class([self._weights], **_accepted(self._class, options))
            self._optimizer.param_groups[0].update(options)
        elif self._weights.data_ptr() != weights.data_ptr():
            self._weights.data = self._shaped(weights)
        return self._weights, self._optimizer

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        # A single number stays a vector of one: a count of steps, which has no shape, is no state of its weights.
        return flat.view(self._shape) if self._shape else flat

    def set_options(self, options: Mapping[str, Any]) -> None:
        """See :class:`downpour_server.rules.Rule`."""
        self._options.update(_usable(options))
        if self._optimizer is not None and self._weights is not None:
            self._optimizer.param_groups[0].update(self._options)
            self._update = update_of(self._optimizer, self._weights)

    def apply(self, weights: torch.Tensor, gradient: torch.Tensor) -> None:
        """See :class:`downpour_server.rules.Rule`."""
        parameter, optimizer = self._bound_to(weights)
        if self._update is not None:
            self._update(weights, gradient)
            return
        parameter.grad = self._shaped(gradient)
        with torch.no_grad():
            self._step(optimizer)
        parameter.grad = None
        self._update = update_of(optimizer, parameter)

    def state(self) -> dict[str, torch.Tensor | float]:
        """See :class:`downpour_server.rules.Rule`."""
        if self._weights is None or self._optimizer is None:
            return {}
        state: dict[str, torch.Tensor | float] = {}
        for name, value in self._optimizer.state[self._weights].items():
            if isinstance(value, torch.Tensor) and value.shape == self._weights.shape:
                state[name] = value.reshape(-1)
            elif value is not None:
                state[name] = float(value)
        return state

    def load_state(self, weights: torch.Tensor, state: Mapping[str, torch.Tensor | float]) -> None:
        """See :class:`downpour_server.rules.Rule`."""
        parameter, optimizer = self._bound_to(weights)
        self._update = None
        for name, value in state.items():
            kept = self._shaped(value) if isinstance(value, torch.Tensor) else _scalar(value)
            optimizer.state[parameter][name] = kept


def _scalar(value: float) -> torch.Tensor:
    """In float32, as torch's optimizers count steps, unless that would round it."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)


def _usable(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name not in IMPLEMENTATION_OPTIONS
    }


def _accepted(optimizer: type[Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(optimizer).parameters
    return {name: value for name, value in options.items() if name in known}


# torch's fused SGD on CPUs leaves most half-precision weights unchanged (pytorch issue 191763, seen in 2.12 and 2.13).
sgd = partial(TorchRule, SGD, _FULL)
adam = partial(TorchRule, Adam, _FULL_AND_HALF)
adamw = partial(TorchRule, AdamW, _FULL_AND_HALF)
adagrad = partial(TorchRule, Adagrad, _FULL_AND_HALF)
rmsprop = partial(TorchRule, RMSprop, _NEVER)
adamax = partial(TorchRule, Adamax, _NEVER)
nadam = partial(TorchRule, NAdam, _NEVER)
radam = partial(TorchRule, RAdam, _NEVER)
adadelta = partial(TorchRule, Adadelta, _NEVER)
asgd = partial(TorchRule, ASGD, _NEVER)
rprop = partial(TorchRule, Rprop, _NEVER)


def by_name(name: str, options: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> TorchRule:
    """The rule of a class that is only imported where it is used."""
    return TorchRule(optimizer_class(name), _NEVER, options, shape)
