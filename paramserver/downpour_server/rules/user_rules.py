"""Update rules that a job brings: an optimizer class in a module beside its script, run in the shard's process.

It is the job's own code, as its script is, and no more trusted or confined than that; nothing but the class is looked
for in the module. What goes wrong in it is a :class:`RuleError` that names it, with its own error as the cause.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from downpour_common.dtypes import ITEMSIZE
from downpour_common.errors import RuleError
from downpour_common.optimizers import parse_user_rule
from downpour_server.rules.torch_rules import TorchRule

_loaded: dict[str, type[Optimizer]] = {}
"""By ``module:Class``."""
_OWN = "own."
_PLAIN: dict[str, type[int] | type[float] | type[bool]] = {"int": int, "float": float, "bool": bool}


def load(rule: str, folder: str) -> None:
    """Import ``module:Class`` from ``folder``, once. Raises :class:`ConfigError`, :class:`RuleError`."""
    module_name, name = parse_user_rule(rule)
    module = _import(rule, module_name, os.path.abspath(folder))
    found = getattr(module, name, None)
    if found is None:
        raise RuleError(rule, f"the module {module.__file__} has no {name}")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise RuleError(rule, f"{name} is no torch.optim.Optimizer; make it a subclass")
    _loaded[rule] = found


def _import(rule: str, name: str, folder: str) -> ModuleType:
    # First while it is imported, so that its neighbours are found as in the script; last afterwards, so that nothing of
    # the job can stand in for what this process imports later.
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RuleError(rule, f"importing {name} from {folder} failed: {_told(error)}") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    file = os.path.realpath(getattr(module, "__file__", None) or "")
    if not file.startswith(os.path.realpath(folder) + os.sep):
        raise RuleError(rule, f"{name} is another module here ({file}); give yours a name of its own")
    return module


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class UserRule(TorchRule):
    """One chunk's instance of a class that :func:`load` has found. ``shape`` as in :class:`TorchRule`.

    The class may do anything with its gradient, which is a copy, and keep in ``self.state[parameter]`` tensors of the
    parameter's shape and numbers; what it keeps elsewhere is not in checkpoints.
    """

    def __init__(self, rule: str, options: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> None:
        super().__init__(_loaded[rule], frozenset(), options, shape)
        self._rule = rule
        self._looked = False

    def apply(self, weights: torch.Tensor, gradient: torch.Tensor) -> None:
        """See :class:`downpour_server.rules.Rule`. Raises :class:`RuleError`."""
        try:
            parameter, optimizer = self._bound_to(weights)
            parameter.grad = self._shaped(gradient.clone())
            with torch.no_grad():
                optimizer.step()
            parameter.grad = None
            if parameter.data_ptr() != weights.data_ptr():  # it has put other weights there
                weights.copy_(parameter.reshape(-1))
                parameter.data = self._shaped(weights)
        except Exception as error:
            raise RuleError(self._rule, f"its step failed: {_told(error)}") from error
        if not self._looked:
            self.state()
            self._looked = True

    def state(self) -> dict[str, torch.Tensor | float]:
        """See :class:`downpour_server.rules.Rule`. Names begin with ``own.``, so that they are no other's; scalars have
        their type in their name: ``own.step|int``, ``own.step|float32`` for a tensor. Raises :class:`RuleError` for
        anything else."""
        if self._weights is None or self._optimizer is None:
            return {}
        state: dict[str, torch.Tensor | float] = {}
        for name, value in self._optimizer.state[self._weights].items():
            if isinstance(value, torch.Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                if value.shape == self._weights.shape and kind in ITEMSIZE:
                    state[f"{_OWN}{name}"] = value.reshape(-1)
                elif value.numel() == 1 and not value.is_complex():
                    state[f"{_OWN}{name}|{kind}"] = float(value)
                else:
                    raise self._unfit(name, f"a tensor of {kind} of shape {list(value.shape)}")
            elif type(value).__name__ in _PLAIN:
                state[f"{_OWN}{name}|{type(value).__name__}"] = float(value)
            elif value is not None:
                raise self._unfit(name, f"a {type(value).__name__}")
        return state

    def _unfit(self, name: str, what: str) -> RuleError:
        assert self._weights is not None
        return RuleError(
            self._rule,
            f"its state {name!r} is {what}; a rule may keep numbers, and tensors of its parameter's shape, which is "
            f"{list(self._weights.shape)} here",
        )

    def load_state(self, weights: torch.Tensor, state: Mapping[str, torch.Tensor | float]) -> None:
        """See :class:`downpour_server.rules.Rule`. Raises :class:`RuleError`."""
        try:
            parameter, optimizer = self._bound_to(weights)
        except Exception as error:
            raise RuleError(self._rule, f"it cannot be made: {_told(error)}") from error
        for key, value in state.items():
            name, _, kind = key.removeprefix(_OWN).rpartition("|")
            if isinstance(value, torch.Tensor):
                optimizer.state[parameter][key.removeprefix(_OWN)] = self._shaped(value)
            elif kind in _PLAIN:
                optimizer.state[parameter][name] = _PLAIN[kind](value)
            else:
                optimizer.state[parameter][name] = torch.tensor(value, dtype=getattr(torch, kind, None))
