"""What a shard of a synchronous job remembers of each worker's way through the data: so that another process can go on
in its place."""

from __future__ import annotations

from collections import deque

PASSES_KEPT = 16
STEPS_KEPT = 4
"""A worker's contributions to two chunks of a shard are one step apart at most, or two with ``fetch_ahead``."""

Pass = tuple[int, int]
"""(loader, epoch); a loader of -1 names none"""


class Passes:
    """Which passes have ended: for each slot the last, and the newest of those that all have ended."""

    def __init__(self) -> None:
        self.ended: dict[int, Pass] = {}
        """slot → the last pass that it has ended"""
        self._over: deque[Pass] = deque(maxlen=PASSES_KEPT)
        self._open: set[Pass] = set()

    def is_over(self, which: Pass) -> bool:
        """Whether all have ended it already."""
        return which in self._over

    def end(self, slot: int, which: Pass) -> None:
        """``slot`` has no more in this pass."""
        if which[0] >= 0:
            self.ended[slot] = which
            self._open.add(which)

    def turn_over(self) -> bool:
        """All have ended; whether it is known what."""
        known = bool(self._open)
        self._over.extend(sorted(self._open))
        self._open.clear()
        return known

    def forget(self, slot: int) -> None:
        """Somebody else is in ``slot``, or nobody."""
        self.ended.pop(slot, None)


class Trail:
    """Position of the training data after each of the newest contributions of each slot."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[int, tuple[int, ...]]]] = {}

    def note(self, slot: int, seq: int, position: tuple[int, ...]) -> None:
        """Contribution ``seq`` has come, to any chunk."""
        steps = self._steps.get(slot)
        if steps is None:
            steps = self._steps[slot] = deque(maxlen=STEPS_KEPT)
        if not steps or steps[-1][0] < seq:
            steps.append((seq, position))

    def before(self, slot: int, seq: int) -> tuple[int, ...]:
        """Where the data were before contribution ``seq``; empty where nothing is known."""
        return next((position for at, position in reversed(self._steps.get(slot, ())) if at < seq), ())

    def begin_at(self, seq: int) -> None:
        """The next contribution of all has this number."""
        for steps in self._steps.values():
            last = steps[-1][1]
            steps.clear()
            steps.append((seq - 1, last))

    def forget(self, slot: int) -> None:
        """Somebody else is in ``slot``, or nobody."""
        self._steps.pop(slot, None)
