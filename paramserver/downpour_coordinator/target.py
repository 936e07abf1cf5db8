"""When a job reaches the value that ``--target`` names. A state machine: times and values in, what was reached out."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from downpour_common.targets import Target, parse_target

WINDOW = 5
"""Newest values, of all workers together, whose median counts; with more workers that log it, as many as they are."""


class TargetWatch:
    """Watches what workers log. The target is reached when the median of the newest values meets it: of :data:`WINDOW`,
    or of as many as there are workers if these are more. Of fewer only when all have trained, with the newest of them.
    Once reached, it stays so.
    """

    def __init__(self, text: str) -> None:
        self.target: Target | None = parse_target(text) if text else None
        self.reached: dict[str, Any] | None = None
        self._values: deque[float] = deque()
        self._newest: dict[str, Any] = {}
        """when the newest value came"""

    def logged(self, values: dict[str, Any], workers: int, seconds: float, clock: int, samples: int) -> bool:
        """A worker has logged ``values`` at its ``clock``, ``seconds`` after the first step, when all had trained
        ``samples``. Whether the target is reached by it."""
        target = self.target
        if target is None or self.reached is not None or target.name not in values:
            return False
        wanted = max(WINDOW, workers)
        self._values.append(float(values[target.name]))
        while len(self._values) > wanted:
            self._values.popleft()
        self._newest = {"seconds": round(seconds, 3), "clock": clock, "samples": samples}
        return len(self._values) == wanted and self._look()

    def trained(self) -> bool:
        """No more values come. Whether the target is reached by the few that there were."""
        return self.reached is None and self._look()

    def _look(self) -> bool:
        value = self.value
        if self.target is None or value is None or not self.target.met_by(value):
            return False
        self.reached = {**self._newest, "value": value}
        return True

    @property
    def value(self) -> float | None:
        """The median of the newest values; a NaN among them is as bad as a value can be. None without one."""
        if self.target is None or not self._values:
            return None
        worst = float("-inf") if self.target.at_least else float("inf")
        median = statistics.median(worst if math.isnan(v) else v for v in self._values)
        return median if math.isfinite(median) else None

    def figures(self) -> dict[str, Any] | None:
        """For people and programs; None for a job without a target."""
        if self.target is None:
            return None
        return {"wanted": str(self.target), "value": self.value, "reached": self.reached}

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {"values": list(self._values), "newest": self._newest, "reached": self.reached}

    def restore(self, document: dict[str, Any]) -> None:
        """The inverse of :meth:`document`."""
        self._values = deque(document.get("values", ()))
        self._newest = document.get("newest", {})
        self.reached = document.get("reached")
