"""Gradients that are pushed late on purpose, to see what staleness does (``inject_staleness``).

A worker that holds each gradient back for K steps, and fetches in all of them, pushes in step t what it has computed
in step t − K, on the weights of then. With one worker each contribution is so K updates late, as among K + 1 workers of
one speed; with n workers it is about n · (K + 1) − 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Late:
    """A gradient that is held back, and what its push says of it."""

    gradients: Mapping[int, torch.Tensor]
    """by segment"""
    versions: list[int]
    """that it was computed on, by chunk"""
    samples: int
    """0: of a step that was skipped"""
    position: tuple[int, ...]
    """of the training data after its step"""


class HeldBack:
    """The gradients of the last ``steps`` steps, oldest first."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._held: deque[Late] = deque()

    def exchange(self, newest: Late) -> Late | None:
        """Take one that has just been computed, whose memory may change; the one that is due now, if any."""
        own = {index: gradient.clone() for index, gradient in newest.gradients.items()}
        self._held.append(Late(own, newest.versions, newest.samples, newest.position))
        return self._held.popleft() if len(self._held) > self._steps else None

    def rest(self) -> list[Late]:
        """All that are still held, which are not any more."""
        rest = list(self._held)
        self._held.clear()
        return rest
