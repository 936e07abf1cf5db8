"""What a shard counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ShardStats:
    """Counters since the shard's start. Staleness counts each trainable chunk of each applied contribution."""

    staleness: Counter[int] = field(default_factory=Counter)
    slots: dict[int, list[int]] = field(default_factory=dict)
    """staleness of each slot's: sum, largest, and how many were 0, 1, 2, 3-4, 5-8, … (:func:`bin_of`)"""
    applied: int = 0
    repeats: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    staged: int = 0
    """payloads that came ahead of their push-pull, used or not"""
    clock_gap_max: int = 0
    updates: int = 0
    round: int = 0
    """newest version of any trainable chunk"""
    lost: int = 0
    """contributions to trainable chunks that a former process of this shard had, and this one has not"""
    lost_pushes: dict[int, int] = field(default_factory=dict)
    """by slot: the largest number of them over the chunks"""
    non_finite: Counter[int] = field(default_factory=Counter)
    """by slot: contributions with NaN or Inf that were left out"""
    late: Counter[int] = field(default_factory=Counter)
    """by slot: contributions that came after their round was complete without them, and were not applied"""
    uncompensated: int = 0
    """contributions to trainable chunks that were applied as they were, because the weights that they were computed on
    are not here"""
    _lost: Counter[tuple[int, int]] = field(default_factory=Counter)
    _last_void: dict[int, int] = field(default_factory=dict)
    _last_late: dict[int, int] = field(default_factory=dict)
    _reported_round: int = 0

    def apply(self, slot: int, staleness: int) -> None:
        """A contribution of ``slot`` to a trainable chunk is applied, ``staleness`` updates after it was begun."""
        self.applied += 1
        self.staleness[staleness] += 1
        row = self.slots.setdefault(slot, [0, 0])
        row[0] += staleness
        row[1] = max(row[1], staleness)
        at = 2 + bin_of(staleness)
        row.extend([0] * (at + 1 - len(row)))
        row[at] += 1

    def lose(self, slot: int, chunk: int, count: int) -> None:
        """``count`` more contributions of ``slot`` to ``chunk`` will never be here."""
        if count:
            self.lost += count
            self._lost[slot, chunk] += count
            self.lost_pushes[slot] = max(self.lost_pushes.get(slot, 0), self._lost[slot, chunk])

    def count_late(self, slot: int, seq: int) -> None:
        """A contribution has come after its round. Counted once for all chunks here, which get the same number one
        after the other."""
        if self._last_late.get(slot) != seq:
            self._last_late[slot] = seq
            self.late[slot] += 1

    def count_void(self, slot: int, seq: int) -> None:
        """A contribution with NaN or Inf is left out; counted as :meth:`count_late` does."""
        if self._last_void.get(slot) != seq:
            self._last_void[slot] = seq
            self.non_finite[slot] += 1

    def losses(self) -> dict[str, Any]:
        """The part of :meth:`document` that is kept with checkpoints."""
        return {"lost": self.lost, "lost_pushes": {str(slot): n for slot, n in sorted(self.lost_pushes.items())}}

    def document(self) -> dict[str, Any]:
        """Plain values for the coordinator; ``rounds_per_report`` is what has come since the last call."""
        rounds, self._reported_round = self.round - self._reported_round, self.round
        return {
            "staleness": {str(k): n for k, n in sorted(self.staleness.items())},
            "slots": {str(slot): list(row) for slot, row in sorted(self.slots.items())},
            "applied": self.applied,
            "repeats": self.repeats,
            "refused": self.refused,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "staged": self.staged,
            "clock_gap_max": self.clock_gap_max,
            "updates": self.updates,
            "round": self.round,
            "rounds_per_report": rounds,
            "non_finite": {str(slot): n for slot, n in sorted(self.non_finite.items())},
            "late": {str(slot): n for slot, n in sorted(self.late.items())},
            "uncompensated": self.uncompensated,
            **self.losses(),
        }


def bin_of(staleness: int) -> int:
    """Where a staleness is counted: 0, 1, 2, then one bin for each power of two up to which it goes."""
    return staleness if staleness < 2 else 1 + (staleness - 1).bit_length()
