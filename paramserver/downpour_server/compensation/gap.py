"""``gap``: gradients are divided by how far the weights have moved since, in steps (Barkai, Hakimi, Schuster 2020).

Gap-Aware measures lateness by distance instead of by count, element by element::

    g' = g ⊘ G,   G = |w(t) − w(b)| / C + 1

Here C is the running mean of what one update moves each element by: C ← C + max(1/n, 1/100) · (|w(n) − w(n−1)| − C),
the plain mean over the first 100 updates n and one over about that many from then on. Before the first update G is 1.
A gradient that is τ updates late is so divided by τ + 1 where all of them went one way, and by 1 where they cancelled.
"""

from __future__ import annotations

import torch

from downpour_server.compensation.plain import Plain

HORIZON = 100
"""Updates that the mean goes over."""


class GapAware(Plain):
    """See the module."""

    needs_bases = True
    follows_updates = True

    def __init__(self, strength: float = 0.0) -> None:
        super().__init__(strength)
        self._step: torch.Tensor | None = None
        """C"""
        self._updates = 0

    def compensate(self, gradient: torch.Tensor, now: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """See :class:`downpour_server.compensation.Compensation`."""
        if base is None or self._step is None:
            return gradient
        # An element that no update has moved, as far as the mean knows, has moved by nothing since either.
        least = torch.finfo(self._step.dtype).tiny
        return gradient / ((now - base).abs() / self._step.clamp(min=least) + 1.0)

    def moved(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """See :class:`downpour_server.compensation.Compensation`."""
        distance = (after - before).abs()
        self._updates += 1
        share = max(1.0 / self._updates, 1.0 / HORIZON)
        self._step = distance if self._step is None else torch.lerp(self._step, distance, share)

    def state(self) -> dict[str, torch.Tensor | float]:
        """See :class:`downpour_server.compensation.Compensation`."""
        return {} if self._step is None else {"step": self._step, "updates": float(self._updates)}

    def load_state(self, state: dict[str, torch.Tensor | float]) -> None:
        """See :class:`downpour_server.compensation.Compensation`."""
        found = state.get("step")
        if isinstance(found, torch.Tensor):
            self._step, self._updates = found, int(state.get("updates", HORIZON))
