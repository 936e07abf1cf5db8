"""Update rules: how a contribution changes a chunk's weights. A new rule is one file and one line here.

A rule is F in A(t) = F(A(t−1), Δ): it owns the optimizer state of one chunk and updates the chunk in place.
Rules must act element by element, because a chunk may be any slice of a tensor or of several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from downpour_server.rules import torch_rules

State = dict[str, torch.Tensor | float]


class Rule(Protocol):
    """The update rule of one chunk."""

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Use these options (lr, …) from the next :meth:`apply` on."""

    def apply(self, weights: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update ``weights`` (flat) in place; ``gradient`` has its shape and dtype and stays as it is."""

    def state(self) -> State:
        """Tensors with one element per weight, and scalars; by name. References, not copies."""

    def load_state(self, weights: torch.Tensor, state: State) -> None:
        """Continue from ``state``, as :meth:`state` gave it for these ``weights``."""


RuleFactory = Callable[[Mapping[str, Any]], Rule]
"""Options of the parameter group → the rule of one chunk."""

RULES: dict[str, RuleFactory] = {
    "SGD": torch_rules.sgd,
    "Adam": torch_rules.adam,
    "AdamW": torch_rules.adamw,
    "Adagrad": torch_rules.adagrad,
    "RMSprop": torch_rules.rmsprop,
    "Adamax": torch_rules.adamax,
    "NAdam": torch_rules.nadam,
    "RAdam": torch_rules.radam,
}
"""By the name of the torch.optim class that the user's script makes."""
