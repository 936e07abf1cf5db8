"""``dc`` and ``dc-adaptive``: delay compensation (Zheng et al. 2017, "Asynchronous SGD with delay compensation").

The gradient at w(t) is guessed from that at w(b), by a Taylor expansion whose Hessian is λ times the diagonal of the
gradient's outer product::

    g' = g + λ(t) · g ⊙ g ⊙ (w(t) − w(b))

``dc`` has λ(t) = λ (DC-ASGD-c); ``dc-adaptive`` has λ(t) = λ / √(s(t) + ε), element by element, with the running mean
s(t) = 0.95 · s(t−1) + 0.05 · g ⊙ g, s(0) = 0 (DC-ASGD-a).
"""

from __future__ import annotations

import torch

from downpour_server.compensation.plain import Plain

DECAY = 0.95
EPSILON = 1e-7


class DelayCompensation(Plain):
    """``dc``; see the module."""

    needs_bases = True

    def compensate(self, gradient: torch.Tensor, now: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """See :class:`downpour_server.compensation.Compensation`."""
        return gradient if base is None else gradient + self._strength * _squared(gradient) * (now - base)


class AdaptiveDelayCompensation(Plain):
    """``dc-adaptive``; see the module."""

    needs_bases = True

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self._mean_square: torch.Tensor | None = None

    def compensate(self, gradient: torch.Tensor, now: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """See :class:`downpour_server.compensation.Compensation`. Contributions that are not late count in the mean."""
        squared = _squared(gradient)
        if self._mean_square is None:
            self._mean_square = torch.zeros_like(squared)
        self._mean_square = torch.lerp(self._mean_square, squared, 1.0 - DECAY)
        if base is None:
            return gradient
        return gradient + self._strength * squared * (now - base) / (self._mean_square + EPSILON).sqrt()

    def state(self) -> dict[str, torch.Tensor | float]:
        """See :class:`downpour_server.compensation.Compensation`."""
        return {} if self._mean_square is None else {"mean_square": self._mean_square}

    def load_state(self, state: dict[str, torch.Tensor | float]) -> None:
        """See :class:`downpour_server.compensation.Compensation`."""
        found = state.get("mean_square")
        if isinstance(found, torch.Tensor):
            self._mean_square = found


def _squared(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient * gradient.conj()).real
