"""Which contributions of one worker to one chunk have been seen: exactly-once under repeats and reordering."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Seen(Enum):
    """What a sequence number means to a window."""

    NEW = "new"
    REPEAT = "repeat"
    TOO_OLD = "too-old"
    """so far behind that the window no longer knows; it was either applied or given up, never apply it"""


@dataclass(slots=True)
class DedupWindow:
    """The highest sequence number below which all were seen, and the ones seen above it.

    ``next_seq``: all below are seen. ``above``: seen, at or above ``next_seq``; at most ``size`` of them, then the
    gap is given up and the window moves on.
    """

    next_seq: int = 0
    above: set[int] = field(default_factory=set)
    size: int = 64
    unsettled: bool = False
    """it comes from a checkpoint, or stands for one that is gone: contributions may have been seen that it does not
    know of, up to the first that comes now"""

    @property
    def next_number(self) -> int:
        """Number of the next contribution, where they come in order."""
        return max(self.above) + 1 if self.above else self.next_seq

    def look(self, seq: int) -> Seen:
        """What ``seq`` is, without recording it."""
        if seq >= self.next_seq:
            return Seen.REPEAT if seq in self.above else Seen.NEW
        return Seen.REPEAT if seq >= self.next_seq - self.size else Seen.TOO_OLD

    def record(self, seq: int) -> None:
        """Mark ``seq``, which must be :attr:`Seen.NEW`, as seen."""
        self.above.add(seq)
        while len(self.above) > self.size:
            self.next_seq = min(self.above)
            self._advance()
        self._advance()

    def settle(self, seq: int) -> int:
        """Nothing below ``seq`` comes any more: what of it was not seen is given up. Returns how many those are."""
        if seq <= self.next_seq:
            return 0
        known = {s for s in self.above if s < seq}
        missing = seq - self.next_seq - len(known)
        self.above -= known
        self.next_seq = seq
        self._advance()
        return missing

    def without(self, seqs: set[int]) -> tuple[int, set[int]]:
        """``next_seq`` and ``above`` as they were if these had not been seen yet."""
        first = min(seqs, default=self.next_seq)
        if first >= self.next_seq:
            return self.next_seq, self.above - seqs
        return first, (self.above | set(range(first, self.next_seq))) - seqs

    def begin_at(self, seq: int) -> None:
        """The next contribution has this number, whatever was seen."""
        self.next_seq = seq
        self.above.clear()

    def _advance(self) -> None:
        while self.next_seq in self.above:
            self.above.remove(self.next_seq)
            self.next_seq += 1
