"""One chunk's compensation at work: the way, the weights that contributions were computed on, the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from downpour_common.compensation import CompensationSpec
from downpour_common.errors import ConfigError
from downpour_server.compensation import PREFIX, WAYS, Compensation, State
from downpour_server.compensation.bases import Bases
from downpour_server.contribution import Contribution
from downpour_server.rules import Rule


class Compensator:
    """``options``: of the chunk's parameter group. ``most``: weights kept for a worker. Raises :class:`ConfigError` for
    an update rule without the learning rate that a way is about.

    A contribution whose base is not known (the shard, or the worker's memory of it, is a former one's) is applied as it
    is; :meth:`knows` tells.
    """

    def __init__(self, spec: CompensationSpec, options: Mapping[str, Any], most: int) -> None:
        self._way: Compensation = WAYS[spec.name](spec.strength)
        self.bases: Bases | None = Bases(most) if self._way.needs_bases else None
        self._lr = options.get("lr")
        self._factor = 1.0
        """of the learning rate that the rule has"""
        if self._way.lr_factor(2) != 1.0 and not isinstance(self._lr, (int, float)):
            raise ConfigError(f"compensation {spec} divides the learning rate lr, and the update rule has none")

    def knows(self, contribution: Contribution, version: int) -> bool:
        """Whether a contribution to this ``version`` of the chunk can be compensated."""
        if self.bases is None or contribution.base_version == version:
            return True
        return self.bases.known(contribution.slot, contribution.base_version)

    def options_changed(self, options: Mapping[str, Any]) -> None:
        """The rule has just been given these."""
        if "lr" in options:
            self._lr, self._factor = options["lr"], 1.0

    def apply(
        self, rule: Rule, weights: torch.Tensor, gradient: torch.Tensor, contribution: Contribution, version: int
    ) -> None:
        """Have ``rule`` change ``weights``, which are of ``version``, by a contribution's ``gradient``."""
        base = None
        if self.bases is not None:
            found = self.bases.of(contribution.slot, contribution.base_version)
            base = None if contribution.base_version == version else found
        factor = self._way.lr_factor(max(0, version - contribution.base_version))
        if factor != self._factor and self._lr is not None:
            rule.set_options({"lr": self._lr * factor})
            self._factor = factor
        before = weights.clone() if self._way.follows_updates else weights
        rule.apply(weights, self._way.compensate(gradient, weights, base))
        self._way.moved(before, weights)

    def state(self) -> State:
        """Of the way, for snapshots: names begin with :data:`PREFIX`."""
        return {PREFIX + name: value for name, value in self._way.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor | float]) -> None:
        """The inverse of :meth:`state`; other names are passed over, as a former way's are."""
        self._way.load_state({n.removeprefix(PREFIX): v for n, v in state.items() if n.startswith(PREFIX)})
