"""Fragments: the parts of a model that are exchanged one after the other (Streaming DiLoCo, Douillard et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from downpour_common.layout import Chunk


@dataclass(slots=True)
class Fragment:
    """Some chunks, and what of them has not been exchanged. ``offset``: the steps of a period after which they are."""

    chunks: tuple[Chunk, ...]
    offset: int
    seq: int
    """number of the next contribution"""
    steps: int = 0
    samples: int = 0
    """since the last exchange"""

    def exchanged(self) -> None:
        """A contribution has been made."""
        self.seq += 1
        self.steps = self.samples = 0


def fragments_of(chunks: Sequence[Chunk], count: int, every: int, first_seq: int) -> list[Fragment]:
    """At most ``count`` fragments of nearly equal bytes, the same in all workers; one at least, if there are chunks.

    Fragment j of k is exchanged after ``(j + 1) * every / k`` steps of each period, rounded down, so the last at its
    end. Within one, chunks are in the order in which the next forward needs them.
    """
    parts: list[list[Chunk]] = [[] for _ in range(min(count, len(chunks)))]
    loads = [0] * len(parts)
    for chunk in sorted(chunks, key=lambda c: (-c.nbytes, c.index)):
        least = loads.index(min(loads))
        parts[least].append(chunk)
        loads[least] += chunk.nbytes
    return [
        Fragment(tuple(sorted(part, key=lambda c: -c.index)), (j + 1) * every // len(parts) % every, first_seq)
        for j, part in enumerate(parts)
    ]
