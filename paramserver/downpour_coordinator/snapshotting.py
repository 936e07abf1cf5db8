"""The snapshots of a training: which one is under way, and at which clock the next one is taken.

In the synchronous mode all shards take it at one clock, which none may have passed when the request arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from downpour_common import messages as m
from downpour_common.layout import ModelSpec
from downpour_coordinator.effects import Send
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.leases import Span, merge
from downpour_coordinator.participants import ShardEntry
from downpour_coordinator.snapshots import CommitSnapshot, Round, SnapshotFailed

LEAST_MARGIN, LARGEST_MARGIN = 2, 4096
"""Clocks that a synchronous snapshot is put ahead of where the shards are expected to be when the request arrives."""


class Snapshots:
    """The snapshot under way, of which there is at most one, and how far ahead the next is put."""

    def __init__(self) -> None:
        self.margin = LEAST_MARGIN
        self._round: Round | None = None

    @property
    def number(self) -> int:
        """Of the one under way, or 0."""
        return 0 if self._round is None else self._round.number

    def begin(
        self, number: int, folder: str, manifest: dict[str, Any], shards: Mapping[int, ShardEntry], ahead: bool
    ) -> None:
        """This one is under way now, instead of any other. ``ahead``: at one clock of all shards."""
        at_clock = self._clock_ahead(shards.values()) if ahead else -1
        self._round = Round(number, folder, len(shards), manifest, at_clock)

    def requests(self, shards: Mapping[int, ShardEntry]) -> list[Send]:
        """To those shards whose answer has not come."""
        if self._round is None:
            return []
        request = m.TakeSnapshot(self._round.number, self._round.folder, self._round.at_clock)
        return [Send(shards[i].peer, request) for i in self._round.missing() if shards[i].peer]

    def abandon(self) -> None:
        """The one under way is not awaited any more."""
        self._round = None

    def taken(self, message: m.SnapshotTaken) -> CommitSnapshot | SnapshotFailed | None:
        """One shard's answer; the outcome once all have answered."""
        outcome = None if self._round is None else self._round.taken(message)
        if outcome is None:
            return None
        self._round = None
        if isinstance(outcome, SnapshotFailed):
            self.margin = min(self.margin * 2, LARGEST_MARGIN)
        else:
            self.margin = max(self.margin // 2, LEAST_MARGIN)
        return outcome

    def _clock_ahead(self, shards: Iterable[ShardEntry]) -> int:
        """A clock that no shard should have reached when the request arrives.

        It is a few reports' pace away, and farther after each attempt that came too late.
        """
        reports = [shard.report for shard in shards]
        clock = max((report.get("round", 0) for report in reports), default=0)
        pace = max((report.get("rounds_per_report", 0) for report in reports), default=0)
        return int(clock + 3 * pace + self.margin)


def manifest_of(facts: JobFacts, model: ModelSpec, clock: int, epoch: int, done: list[Span]) -> dict[str, Any]:
    """What a manifest says beside its files; ``epoch`` and ``done`` are the position in the data."""
    return {
        "format": 1,
        "job": facts.job,
        "mode": str(facts.mode),
        "seed": facts.seed,
        "clock": clock,
        "shards": facts.shards,
        "chunk_bytes": facts.chunk_bytes,
        "model": model.to_wire(),
        "data": {"epoch": epoch, "done": [list(span) for span in merge(done)]},
        "synchronous": facts.mode.synchronous,
    }
