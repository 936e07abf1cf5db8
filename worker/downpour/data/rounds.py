"""How a pass is split when every worker takes its part of every round: the synchronous modes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """Positions ``start:stop`` of the pass are this worker's; after the round ``offset`` positions are used up."""

    start: int
    stop: int
    offset: int
    last: bool


@dataclass(frozen=True, slots=True)
class RoundSplit:
    """A pass of ``total`` positions in rounds of ``workers`` batches of ``unit``.

    Together the workers' parts of a round are what one process with a batch of ``workers * unit`` would take. The
    last, smaller round is split evenly, or dropped where the loader drops its last batch.
    """

    total: int
    unit: int
    workers: int
    index: int
    """of this worker among them"""
    drop_last: bool
    offset: int = 0

    @property
    def rounds(self) -> int:
        """Rounds from ``offset`` on."""
        whole, rest = divmod(max(0, self.total - self.offset), self.unit * self.workers)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Round]:
        """This worker's part of each round; a part may be empty in the last one."""
        size = self.unit * self.workers
        for index in range(self.rounds):
            low = self.offset + index * size
            count = min(size, self.total - low)
            start = low + count * self.index // self.workers
            stop = low + count * (self.index + 1) // self.workers
            yield Round(start, stop, low + count, index == self.rounds - 1)
