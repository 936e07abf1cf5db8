"""Whether something pays, found out by doing steps with it and steps without. No clock: times come in."""

from __future__ import annotations

import statistics
from typing import Literal

BLOCK = 4
"""Steps of one kind in a row in a comparison, the first of which is not counted."""
BLOCKS = 6
HARM = 1.1
"""What a step with it lasts, of a step without, if the comparison need not go on."""
SHORTEST, LONGEST = 32, 1024
"""Steps between two comparisons, while they come to the same result."""
WORTH = 0.98
"""What a step with it may last at most, of a step without."""


class Trial:
    """Compares, goes by the result for a while, and compares again; for longer each time, up to a limit.

    ``on``: whether to do the coming step with it.
    """

    def __init__(self) -> None:
        self.on = False
        self._ended_s: float | None = None
        self._step = 0
        """of the comparison under way"""
        self._took_s: dict[bool, list[float]] = {True: [], False: []}
        self._result: bool | None = None
        self._pause = SHORTEST
        self._left = 0
        """steps until the next comparison"""

    def ended(self, now_s: float, verdict: Literal["futile", "done", "none"]) -> None:
        """A step is over. ``verdict``: what was done in it was for nothing, was of use, or could not be done."""
        took_s = None if self._ended_s is None else now_s - self._ended_s
        self._ended_s = now_s
        if self.on and verdict == "futile":
            self._decide(False)
        elif self._left:
            self._left -= 1
            if not self._left:
                self._begin()
        else:
            if self._step % BLOCK and took_s is not None and (not self.on or verdict == "done"):
                self._took_s[self.on].append(took_s)
            self._step += 1
            self.on = self._step // BLOCK % 2 == 1
            if self._step == BLOCK * BLOCKS or (self._step % BLOCK == 0 and self._ratio() > HARM):
                self._decide(self._ratio() < WORTH)

    def _ratio(self) -> float:
        """How long steps with it last, of those without; 1 while nothing is known."""
        with_it, without = self._took_s[True], self._took_s[False]
        return statistics.median(with_it) / max(statistics.median(without), 1e-9) if with_it and without else 1.0

    def _decide(self, result: bool) -> None:
        self._pause = min(2 * self._pause, LONGEST) if result == self._result else SHORTEST
        self.on = self._result = result
        self._left = self._pause

    def _begin(self) -> None:
        self.on = False
        self._step = 0
        self._took_s = {True: [], False: []}
