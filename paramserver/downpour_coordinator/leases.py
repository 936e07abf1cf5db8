"""Leases on the samples of one pass: every position goes to one worker at a time and is finished once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]
"""Positions start:stop."""

LARGEST_LEASE = 16
"""Batches in one lease at most; towards the end of a pass leases shrink, so that nobody is left with much."""


@dataclass(slots=True)
class PassLedger:
    """One pass over one loader: ``total`` positions, each free, leased to a slot, or done.

    Invariant: free, leased and done spans are disjoint and cover ``0:total``.
    """

    total: int
    order: str
    free: list[Span] = field(default_factory=list)
    leased: dict[int, list[Span]] = field(default_factory=dict)
    done: list[Span] = field(default_factory=list)

    @classmethod
    def begin(cls, total: int, order: str, done: list[Span]) -> PassLedger:
        """A pass in which the spans ``done`` were finished before (by a run that this one resumes)."""
        finished = merge([(a, min(b, total)) for a, b in done if a < total])
        return cls(total, order, complement(finished, total), {}, finished)

    def grant(self, slot: int, unit: int, workers: int) -> Span:
        """The next free positions, whole batches of ``unit`` but for the last; an empty span when none are left."""
        if not self.free:
            return (self.total, self.total)
        start, stop = self.free[0]
        batches = -(-sum(b - a for a, b in self.free) // unit)
        wanted = min(max(batches // (2 * workers), 1), LARGEST_LEASE) * unit
        end = min(start + wanted, stop)
        self.free[0:1] = [(end, stop)] if end < stop else []
        self.leased.setdefault(slot, []).append((start, end))
        return (start, end)

    def finish(self, slot: int, span: Span) -> None:
        """``slot`` has finished ``span``, which must be within what it holds; anything else is ignored."""
        held = self.leased.get(slot, [])
        for index, (start, stop) in enumerate(held):
            if start <= span[0] < span[1] <= stop:
                held[index : index + 1] = [s for s in ((start, span[0]), (span[1], stop)) if s[0] < s[1]]
                self.done = merge([*self.done, span])
                return

    def release(self, slot: int) -> None:
        """What ``slot`` holds and has not finished is free again."""
        self.free = merge([*self.free, *self.leased.pop(slot, [])])

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {
            "total": self.total,
            "order": self.order,
            "free": self.free,
            "leased": list(self.leased.items()),
            "done": self.done,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> PassLedger:
        """The inverse of :meth:`document`."""

        def spans(pairs: list[list[int]]) -> list[Span]:
            return [(a, b) for a, b in pairs]

        leased = {slot: spans(held) for slot, held in document["leased"]}
        return cls(document["total"], document["order"], spans(document["free"]), leased, spans(document["done"]))

    @property
    def closed(self) -> bool:
        """Whether every position is done."""
        return self.done == [(0, self.total)] or self.total == 0


def merge(spans: list[Span]) -> list[Span]:
    """Sorted, touching spans joined, empty ones dropped."""
    merged: list[Span] = []
    for start, stop in sorted(s for s in spans if s[0] < s[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def complement(spans: list[Span], total: int) -> list[Span]:
    """What merged ``spans`` leave of ``0:total``."""
    edges = [0, *[edge for span in spans for edge in span], total]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
