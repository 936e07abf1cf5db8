"""What a shard's processes have counted, over all its lives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

CUTS_KEPT = 16
"""Newest checkpoints of which it is known what had been lost by then."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Pushes that a shard has given up: ``contributions`` to chunks, ``pushes`` of whole workers."""

    contributions: int = 0
    pushes: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.contributions + other.contributions, self.pushes + other.pushes)

    @classmethod
    def of(cls, document: dict[str, Any]) -> Lost:
        """As a report, or an entry in a manifest, has it; those that do not say lost nothing."""
        pushes = document.get("lost_pushes", 0)
        return cls(int(document.get("lost", 0)), sum(pushes.values()) if isinstance(pushes, dict) else int(pushes))


@dataclass(slots=True)
class Past:
    """What the former processes of a shard leave behind.

    What was lost is counted from the checkpoint on that the newest process has come back from: it finds everything
    missing that came after that, whichever process had lost it. So ``cuts`` has what had been lost at each checkpoint.
    """

    staleness: Counter[int] = field(default_factory=Counter)
    slots: dict[int, list[int]] = field(default_factory=dict)
    """as :func:`slots_of`"""
    clock_gap_max: int = 0
    non_finite: Counter[int] = field(default_factory=Counter)
    late: Counter[int] = field(default_factory=Counter)
    lost: Lost = Lost()
    known: Lost = Lost()
    """all that is known to be lost from the present process' part of a checkpoint; its reports may come late"""
    cuts: dict[int, Lost] = field(default_factory=dict)

    def cut(self, number: int, entry: dict[str, Any], report: dict[str, Any]) -> None:
        """The present process has written its part of checkpoint ``number``."""
        self.known = self.cuts[number] = self.lost + Lost.of(entry if "lost" in entry else report)
        for old in sorted(self.cuts)[:-CUTS_KEPT]:
            del self.cuts[old]

    def add(self, report: dict[str, Any]) -> None:
        """The process that said this last is no more."""
        self.staleness.update(staleness_of(report))
        add_slots(self.slots, slots_of(report))
        self.non_finite.update(non_finite_of(report))
        self.late.update(late_of(report))
        self.clock_gap_max = max(self.clock_gap_max, int(report.get("clock_gap_max", 0)))
        self.lost = self.total(report)  # until it is known where the next one begins

    def resumed(self, number: int) -> None:
        """The new process comes back from checkpoint ``number``."""
        self.lost = self.known = self.cuts.get(number, Lost())

    def total(self, report: dict[str, Any]) -> Lost:
        """What has been lost up to the present process' last ``report``."""
        return max(self.lost + Lost.of(report), self.known, key=lambda lost: lost.contributions)

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {
            "staleness": list(self.staleness.items()),
            "slots": list(self.slots.items()),
            "clock_gap_max": self.clock_gap_max,
            "non_finite": list(self.non_finite.items()),
            "late": list(self.late.items()),
            "lost": [self.lost.contributions, self.lost.pushes],
            "known": [self.known.contributions, self.known.pushes],
            "cuts": [[n, lost.contributions, lost.pushes] for n, lost in self.cuts.items()],
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Past:
        """The inverse of :meth:`document`."""
        return cls(
            Counter(dict(document["staleness"])),
            {slot: list(row) for slot, row in document.get("slots", [])},
            document["clock_gap_max"],
            Counter(dict(document["non_finite"])),
            Counter(dict(document.get("late", []))),
            Lost(*document["lost"]),
            Lost(*document["known"]),
            {n: Lost(contributions, pushes) for n, contributions, pushes in document["cuts"]},
        )


def staleness_of(report: dict[str, Any]) -> dict[int, int]:
    """Contributions by staleness."""
    return {int(k): n for k, n in report.get("staleness", {}).items()}


def slots_of(report: dict[str, Any]) -> dict[int, list[int]]:
    """By slot: sum of its contributions' staleness, the largest, and how many were 0, 1, 2, 3-4, 5-8, …"""
    return {int(slot): row for slot, row in report.get("slots", {}).items()}


def add_slots(total: dict[int, list[int]], more: dict[int, list[int]]) -> None:
    """Add ``more`` of :func:`slots_of` to ``total``."""
    for slot, row in more.items():
        before = total.get(slot, [0, 0])
        counts = [a + b for a, b in zip_longest(before[2:], row[2:], fillvalue=0)]
        total[slot] = [before[0] + row[0], max(before[1], row[1]), *counts]


def non_finite_of(report: dict[str, Any]) -> dict[int, int]:
    """Contributions with NaN or Inf by the slot they came from."""
    return {int(k): n for k, n in report.get("non_finite", {}).items()}


def late_of(report: dict[str, Any]) -> dict[int, int]:
    """Contributions that came after their round by the slot they came from."""
    return {int(k): n for k, n in report.get("late", {}).items()}


def late_in_words(late: dict[str, int]) -> str:
    """Of contributions that were not applied, for people: how many, and of which workers."""
    each = ", ".join(f"{worker} {count:,}" for worker, count in late.items())
    return f"{sum(late.values()):,} contributions came after their round and were left out ({each})"
