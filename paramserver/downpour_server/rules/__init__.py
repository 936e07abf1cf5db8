"""Update rules: how a contribution changes a chunk's weights. A new rule is one file and one line here.

A rule is F in A(t) = F(A(t−1), Δ): it owns the optimizer state of one chunk and updates the chunk in place. Most act
element by element, because a chunk may be any slice of a tensor or of several. Rules that look at whole tensors
(``common/optimizers.py: WHOLE_RULES``) get a layout in which each chunk is one, and its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch

from downpour_common.errors import ConfigError
from downpour_common.optimizers import OUTER_RULE
from downpour_server.rules import torch_rules, user_rules

State = dict[str, torch.Tensor | float]


class Rule(Protocol):
    """The update rule of one chunk."""

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Use these options (lr, …) from the next :meth:`apply` on."""

    def apply(self, weights: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update ``weights`` (flat) in place; ``gradient`` has its shape and dtype and stays as it is."""

    def state(self) -> State:
        """Tensors with one element per weight, flat, and scalars; by name. References, not copies."""

    def load_state(self, weights: torch.Tensor, state: State) -> None:
        """Continue from ``state``, as :meth:`state` gave it for these ``weights``."""


class RuleFactory(Protocol):
    """Makes the rule of one chunk."""

    def __call__(self, options: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> Rule:
        """``options``: of the parameter group. ``shape``: of the tensor that the chunk is, where it is a whole one."""


RULES: dict[str, RuleFactory] = {
    "SGD": torch_rules.sgd,
    "Adam": torch_rules.adam,
    "AdamW": torch_rules.adamw,
    "Adagrad": torch_rules.adagrad,
    "RMSprop": torch_rules.rmsprop,
    "Adamax": torch_rules.adamax,
    "NAdam": torch_rules.nadam,
    "RAdam": torch_rules.radam,
    "Adadelta": torch_rules.adadelta,
    "ASGD": torch_rules.asgd,
    "Rprop": torch_rules.rprop,
    "Muon": partial(torch_rules.by_name, "Muon"),
    "LAMB": partial(torch_rules.by_name, "LAMB"),
    "LARS": partial(torch_rules.by_name, "LARS"),
    "FTRL": partial(torch_rules.by_name, "FTRL"),
    "Lion": partial(torch_rules.by_name, "Lion"),
    "MuonAdamW": partial(torch_rules.by_name, "MuonAdamW"),
    OUTER_RULE: torch_rules.sgd,
}
"""By the name of the optimizer class that the user's script makes."""


def check_rule(name: str, own: str, folder: str) -> None:
    """That the rule ``name`` of a model can be made here. ``own``: the rule that the job brings, if any, in a module in
    ``folder``. Raises :class:`ConfigError`, :class:`downpour_common.errors.RuleError`."""
    if name and name == own:
        user_rules.load(name, folder)
    elif name and name not in RULES:
        raise ConfigError(f"no update rule is called {name!r}; known: {', '.join(RULES)}")


def make_rule(name: str, options: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> Rule:
    """The rule of one chunk; see :class:`RuleFactory`. ``name`` has passed :func:`check_rule`."""
    factory = RULES.get(name)
    return user_rules.UserRule(name, options, shape) if factory is None else factory(options, shape)
