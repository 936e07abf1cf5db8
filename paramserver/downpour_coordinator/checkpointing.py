"""When a job's checkpoints are begun, asked for again, and tried again.

With ``checkpoint_s=auto`` by Young's formula: of checkpoints that cost the training C seconds each, in a job that fails
every M seconds, one every √(2·C·M) seconds loses the least time to checkpoints and to work that is done again. C is
what the shards say of theirs, M an assumption that the job's own failures correct.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from downpour_common.config import Settings
from downpour_coordinator.effects import Effect, ForgetSnapshot, Prune
from downpour_coordinator.training import Training

RETRY_S = 5.0
"""Longest time before a checkpoint that failed is tried again."""
REPEAT_S = 2.0
"""Time before a request that has no answer is repeated: often enough that a job's end outlasts lost messages."""
FIRST_RETRY_S = 0.1
UNKNOWN_S = 30.0
"""``auto``: time to the first one, of which nobody knows yet what it costs."""
LEAST_S, LARGEST_S = 10.0, 600.0
"""``auto``: whatever the formula says."""
WISHES_KEPT = 64


@dataclass(slots=True)
class Copying:
    """How far the copies at the job's URL are. Whoever copies them writes here."""

    url: str = ""
    number: int = 0
    """the newest that is there"""
    problem: str = ""
    """why a newer one is not"""


@dataclass(slots=True)
class Wish:
    """A checkpoint that somebody asked for: the first that begins after."""

    number: int = 0
    """0: none has begun yet"""
    committed: bool = False
    error: str = ""
    """why the last one that was meant to be it has failed"""


@dataclass(slots=True)
class _Cost:
    """What a checkpoint costs the training, in seconds; ``known`` after the first."""

    seconds: float = 0.0
    known: bool = False

    def measured(self, seconds: float) -> None:
        self.seconds = (self.seconds + seconds) / 2 if self.known else seconds
        self.known = True


@dataclass(slots=True)
class _Failures:
    """How many the job has had in ``trained_s`` seconds."""

    assumed_s: float
    count: int = 0
    trained_s: float = 0.0

    @property
    def mtbf_s(self) -> float:
        """The assumption counts like one failure that was seen; without any it stays."""
        return min(self.assumed_s, (self.assumed_s + self.trained_s) / (1 + self.count))


class Checkpointing:
    """Numbers and times of one job's checkpoints. ``base`` comes before ``checkpoints/NNNNNN``."""

    def __init__(
        self, base: str, number: int, interval_s: float | Literal["auto"], keep: int, mtbf_s: float = 14400.0
    ) -> None:
        self.base, self.number = base, number
        self.failing = ""
        """why the newest ones failed"""
        self.copies = Copying()
        self.committed = 0
        """the newest that was committed by this process, or 0"""
        self._given_s, self._keep = interval_s, keep
        self._cost = _Cost()
        self._failures = _Failures(mtbf_s)
        self._wishes: dict[str, Wish] = {}
        self._under_way = 0
        self._begun_s = 0.0
        self._committed_s = 0.0
        self._failed = 0
        self._retry_s = 0.0
        self._asked_s = float("-inf")

    def settings(self, settings: Settings) -> None:
        """From now on as these say."""
        self._given_s, self._keep = settings.checkpoint_s, settings.keep_checkpoints
        self._failures.assumed_s = settings.mtbf_s

    @property
    def degraded(self) -> str:
        """What is wrong with the checkpoints or their copies, or ""."""
        return "; ".join(filter(None, (self.failing, self.copies.problem)))

    @property
    def interval_s(self) -> float:
        """Time between two; 0: only the last one."""
        if self._given_s != "auto":
            return self._given_s
        if not self._cost.known:
            return UNKNOWN_S
        return min(max(math.sqrt(2 * self._cost.seconds * self._failures.mtbf_s), LEAST_S), LARGEST_S)

    def folder(self, number: int) -> str:
        """Where checkpoint ``number`` lies, as the shards are told."""
        return f"{self.base}checkpoints/{number:06d}"

    # ------------------------------------------------------------ when

    def wait_from(self, now_s: float) -> None:
        """The next one is due an interval after this; what was under way is not any more."""
        self._begun_s = now_s
        self._under_way = 0

    def failures_seen(self, count: int, trained_s: float) -> None:
        """The job has failed so often in this time; it shortens the interval."""
        self._failures.count, self._failures.trained_s = count, trained_s

    def due(self, now_s: float) -> bool:
        """Whether it is time for one."""
        interval_s = self.interval_s
        if self._failed and (interval_s or self._wished):
            return self.may_retry(now_s)
        return self._wished or (bool(interval_s) and now_s - self._begun_s >= interval_s)

    def may_retry(self, now_s: float) -> bool:
        """Whether one that is urgent may begin, the last one having failed or not."""
        return not self._failed or now_s >= self._retry_s

    def begin(self, training: Training, now_s: float, effects: list[Effect], final: bool = False) -> int:
        """Number of the checkpoint that has begun; 0 when none can yet."""
        number = self.number + 1
        asked = training.begin_snapshot(number, self.folder(number), final)
        if training.snapshot != number:
            return 0
        self.number = self._under_way = number
        self._begun_s = self._asked_s = now_s
        self._retry_s = now_s + RETRY_S
        for wish in self._wishes.values():
            if not wish.committed:
                wish.number = number
        effects.extend(asked)
        return number

    def repeat(self, training: Training, now_s: float, effects: list[Effect]) -> None:
        """Ask again those that have not answered, now and then."""
        if now_s - self._asked_s > REPEAT_S:
            self._asked_s = now_s
            effects.extend(training.repeat_snapshot())

    def done(self, number: int, error: str, now_s: float, effects: list[Effect]) -> None:
        """Checkpoint ``number`` was committed, or why not."""
        if number == self._under_way:
            self._under_way = 0
        self._failed = self._failed + 1 if error else 0
        # In sync one that came too late is usual; it is repeated at once, farther ahead.
        self.failing = f"checkpoint {number}: {error}" if self._failed > 1 else ""
        for wish in self._wishes.values():
            if wish.number == number and not wish.committed:
                wish.committed, wish.error = not error, error
        if error:
            self._retry_s = now_s + min(RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failed, 10))
            effects.append(ForgetSnapshot(number))
        else:
            self.committed, self._committed_s = number, now_s
            effects.append(Prune(self._keep))

    # ------------------------------------------------------------ what it costs

    def measured(self, files: Iterable[Mapping[str, Any]], hosts: Mapping[int, str]) -> None:
        """What the shards say of theirs: ``files`` of a manifest, in the order of the shards; ``hosts`` by shard.

        Shards of one host share its cores, so what theirs took adds up; hosts work side by side.
        """
        by_host: dict[str, float] = {}
        for shard, entry in enumerate(files):
            host = hosts.get(shard, "")
            by_host[host] = by_host.get(host, 0.0) + float(entry.get("cost_s", 0.0))
        self._cost.measured(max(by_host.values(), default=0.0))

    # ------------------------------------------------------------ asked for

    @property
    def _wished(self) -> bool:
        return not self._under_way and any(not wish.committed for wish in self._wishes.values())

    def knows(self, token: str) -> bool:
        """Whether this wish has been heard."""
        return token in self._wishes

    def wish(self, token: str) -> Wish:
        """Have a checkpoint begin as soon as may be, once per ``token``; how far it is."""
        if token not in self._wishes:
            self._wishes[token] = Wish()
            while len(self._wishes) > WISHES_KEPT:
                del self._wishes[next(iter(self._wishes))]
        return self._wishes[token]

    # ------------------------------------------------------------ for people

    def document(self, now_s: float) -> dict[str, Any]:
        """Plain values for status. ``cost_s`` is None before the first one."""
        return {
            "auto": self._given_s == "auto",
            "interval_s": round(self.interval_s, 3),
            "cost_s": round(self._cost.seconds, 4) if self._cost.known else None,
            "mtbf_s": round(self._failures.mtbf_s, 1),
            "committed": self.committed,
            "age_s": round(max(0.0, now_s - self._committed_s), 3) if self.committed else None,
            "url": self.copies.url,
            "copied": self.copies.number,
        }
