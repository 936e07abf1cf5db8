"""Contenders of the busy benchmark: one job each, which does several tasks in every turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench_lib.local_job import PushPullJob

TASKS = ("push", "busy-push", "step", "busy-step", "busy-loops")
"""Of ``scripts/push.py``: pushes, and pushes with pulls, without and with a busy thread; that thread alone."""


@dataclass
class Samples:
    """What one task came to, a value per turn."""

    seconds: list[float] = field(default_factory=list)  # of one push or one push and pull
    loops_per_s: list[float] = field(default_factory=list)  # of the busy thread, where there is one


class BusyJob(PushPullJob):
    """A turn does every task in turn, ``repeats`` times each; its samples are kept here."""

    def __init__(self, name: str, megabytes: int, timeout_s: float, options: Sequence[str], repeats: int) -> None:
        super().__init__(name, megabytes, timeout_s, options)
        self._repeats = repeats
        self.samples = {task: Samples() for task in TASKS}

    def run_once(self) -> float:
        """All tasks; the seconds of all together."""
        total_s = 0.0
        for task in TASKS:
            taken = self.programs.turn(1, self._repeats, task)
            total_s += taken.seconds
            self.samples[task].seconds.append(taken.seconds / self._repeats)
            self.samples[task].loops_per_s.append(taken.value)
        return total_s
