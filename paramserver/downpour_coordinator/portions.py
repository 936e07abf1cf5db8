"""The portions of one evaluation: who computes what, and backups of those that are awaited longest (Dean et al. 2012,
section 4.2: each worker gets a small portion at a time, and at the end several may have the same, of which the first
counts)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_COPIES = 2
"""Workers that have the same portion at a time."""


def cut(samples: int, unit: int, count: int) -> list[tuple[int, int]]:
    """``samples`` in at most ``count`` ranges of whole batches of ``unit``, as equal as can be."""
    batches = -(-samples // unit)
    count = max(1, min(count, batches))
    ends = [min(samples, unit * (batches * (i + 1) // count)) for i in range(count)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(slots=True)
class Portions:
    """Of an evaluation, by number. ``ranges``: the samples of each. ``backups``: whether there are any."""

    evaluation: int
    ranges: list[tuple[int, int]]
    backups: bool = True
    holders: dict[int, list[int]] = field(default_factory=dict)
    """portion → slots that compute it, those first that were handed out longest ago"""
    losses: dict[int, float] = field(default_factory=dict)
    """of those that are finished, summed over samples"""
    given: int = 0
    """backups that were handed out"""

    def take(self, slot: int) -> int:
        """A portion for the worker in ``slot``, which has none; -1: there is none."""
        self.release(slot)
        held = self.holders
        for portion in range(len(self.ranges)):
            if portion not in self.losses and not held.get(portion):
                held.pop(portion, None)
                held[portion] = [slot]
                return portion
        if not self.backups:
            return -1
        for portion, slots in held.items():
            if len(slots) < MOST_COPIES:
                slots.append(slot)
                self.given += 1
                return portion
        return -1

    def finished(self, portion: int, loss: float) -> Sequence[int]:
        """A worker has finished it; returns the slots that do so for nothing. What comes again changes nothing."""
        if not 0 <= portion < len(self.ranges) or portion in self.losses:
            return ()
        self.losses[portion] = loss
        return self.holders.pop(portion, ())

    def release(self, slot: int) -> None:
        """The worker in ``slot`` computes nothing any more."""
        for portion, slots in list(self.holders.items()):
            if slot in slots:
                slots.remove(slot)
                if not slots:
                    del self.holders[portion]

    def at_work(self) -> list[tuple[int, int]]:
        """(slot, portion) of those that are computed."""
        return [(slot, portion) for portion, slots in self.holders.items() for slot in slots]

    @property
    def complete(self) -> bool:
        """Whether the loss is known: of all portions, or not finite in one."""
        return len(self.losses) == len(self.ranges) or not all(map(math.isfinite, self.losses.values()))

    @property
    def total(self) -> float:
        """The sum of the losses, in the order of the portions."""
        return sum(self.losses[portion] for portion in sorted(self.losses))
