"""What is done about contributions that are late. A new way is one file and one line here.

A contribution was computed on weights w(b) and is applied to w(t); t − b updates of others lie between, its staleness.
A way changes the gradient, or the learning rate, of one contribution before the update rule sees it. Ways act element
by element, as rules do, because a chunk may be any slice; and where nothing lies between, none changes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from downpour_server.compensation.delay import AdaptiveDelayCompensation, DelayCompensation
from downpour_server.compensation.gap import GapAware
from downpour_server.compensation.stale_lr import StaleLearningRate

State = dict[str, torch.Tensor | float]
PREFIX = "compensation."
"""Of the names of its state beside the update rule's."""


class Compensation(Protocol):
    """One way, for one chunk."""

    needs_bases: bool
    """:meth:`compensate` must be given the weights that the contribution was computed on"""
    follows_updates: bool
    """:meth:`moved` must be told of every update"""

    def lr_factor(self, staleness: int) -> float:
        """What the learning rate is multiplied by for a contribution that is so many updates late."""

    def compensate(self, gradient: torch.Tensor, now: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """The gradient to apply at the weights ``now``; ``base``: those that ``gradient`` was computed on, None where
        they are the same or unknown. All flat, of one shape and dtype; none of them is changed."""

    def moved(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """The rule has changed the weights."""

    def state(self) -> State:
        """Tensors with one element per weight, which are replaced and never written to, and scalars; by name."""

    def load_state(self, state: State) -> None:
        """Continue from what :meth:`state` gave, here or in a way that knows other names."""


WAYS: dict[str, Callable[[float], Compensation]] = {
    "stale-lr": StaleLearningRate,
    "dc": DelayCompensation,
    "dc-adaptive": AdaptiveDelayCompensation,
    "gap": GapAware,
}
"""By name: made with its strength."""
