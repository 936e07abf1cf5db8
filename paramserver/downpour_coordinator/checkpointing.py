"""When a job's checkpoints are begun, asked for again, and tried again."""

from __future__ import annotations

from downpour_coordinator.effects import Effect, ForgetSnapshot, Prune
from downpour_coordinator.training import Training

RETRY_S = 5.0
"""Longest time before a checkpoint that failed is tried again; time before a request for one is repeated."""
FIRST_RETRY_S = 0.1


class Checkpointing:
    """Numbers and times of one job's checkpoints. ``base`` comes before ``checkpoints/NNNNNN``."""

    def __init__(self, base: str, number: int, interval_s: float, keep: int) -> None:
        self.base, self.number = base, number
        self.degraded = ""
        """why the newest ones failed"""
        self._interval_s, self._keep = interval_s, keep
        self._begun_s = 0.0
        self._failed = 0
        self._asked_s = float("-inf")

    def folder(self, number: int) -> str:
        """Where checkpoint ``number`` lies, as the shards are told."""
        return f"{self.base}checkpoints/{number:06d}"

    def wait_from(self, now_s: float) -> None:
        """The next one is due an interval after this."""
        self._begun_s = now_s

    def due(self, now_s: float) -> bool:
        """Whether it is time for one."""
        return bool(self._interval_s) and now_s - self._begun_s >= self._interval_s

    def may_retry(self, now_s: float) -> bool:
        """Whether one that is urgent may begin, the last one having failed or not."""
        return not self._failed or now_s - self._begun_s >= self._interval_s

    def begin(self, training: Training, now_s: float, effects: list[Effect], final: bool = False) -> int:
        """Number of the checkpoint that has begun; 0 when none can yet."""
        number = self.number + 1
        asked = training.begin_snapshot(number, self.folder(number), final)
        if training.snapshot != number:
            return 0
        self.number = number
        self._begun_s = self._asked_s = now_s
        effects.extend(asked)
        return number

    def repeat(self, training: Training, now_s: float, effects: list[Effect]) -> None:
        """Ask again those that have not answered, now and then."""
        if now_s - self._asked_s > RETRY_S:
            self._asked_s = now_s
            effects.extend(training.repeat_snapshot())

    def done(self, number: int, error: str, now_s: float, effects: list[Effect]) -> None:
        """Checkpoint ``number`` was committed, or why not."""
        self._failed = self._failed + 1 if error else 0
        # In sync one that came too late is usual; it is repeated at once, farther ahead.
        self.degraded = f"checkpoint {number}: {error}" if self._failed > 1 else ""
        if error:
            pause_s = min(RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failed, 10))
            self._begun_s = now_s + pause_s - self._interval_s
            effects.append(ForgetSnapshot(number))
        else:
            effects.append(Prune(self._keep))
