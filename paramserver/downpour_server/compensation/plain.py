"""What most ways have in common: they leave alone what they do not change."""

from __future__ import annotations

import torch


class Plain:
    """A way that changes nothing; see :class:`downpour_server.compensation.Compensation`."""

    needs_bases = False
    follows_updates = False

    def __init__(self, strength: float = 0.0) -> None:
        self._strength = strength

    def lr_factor(self, _staleness: int) -> float:
        """See :class:`downpour_server.compensation.Compensation`."""
        return 1.0

    def compensate(self, gradient: torch.Tensor, _now: torch.Tensor, _base: torch.Tensor | None) -> torch.Tensor:
        """See :class:`downpour_server.compensation.Compensation`."""
        return gradient

    def moved(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """See :class:`downpour_server.compensation.Compensation`."""

    def state(self) -> dict[str, torch.Tensor | float]:
        """See :class:`downpour_server.compensation.Compensation`."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor | float]) -> None:
        """See :class:`downpour_server.compensation.Compensation`."""
