"""Counting the bytes of weights and gradients that a worker holds."""

from __future__ import annotations

from downpour import spans


class Ledger:
    """``budget``: the most that is to be held; ``peak``: the most that has been held. In bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held = 0
        self.peak = 0

    def take(self, nbytes: int) -> None:
        """So much more is held."""
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        spans.peak("weights_and_gradients", self.held)

    def give(self, nbytes: int) -> None:
        """So much less is held."""
        self.held -= nbytes

    def lacks(self, nbytes: int) -> int:
        """What would be over the budget with so much more."""
        return max(0, self.held + nbytes - self.budget)
