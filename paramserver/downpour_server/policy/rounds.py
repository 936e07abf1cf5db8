"""``sync,backup=b``: rounds that do without the slowest ``b`` workers (Chen et al. 2016), who come and go at any time.

A slot's contributions queue up in the order it sent them. The open round is complete when all awaited slots but ``b``
have one queued; it takes the head of every queue, in slot order, those of slots that have ended, left or died included.
Whoever is awaited counts: a worker that joins is awaited from the open round on, and one that is gone is not, so a
round never waits for somebody who cannot come.

A contribution that was made from weights of a round that is over is *late*: it counts for nothing, and its worker gets
the newest weights at once. So a slow worker drops contributions, and never holds up the others; and one that joined
in another round on each chunk is in the same one everywhere after its first answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Awaited


class Versioned(Protocol):
    """The chunk, as its rounds see it."""

    version: int
    """updates that it has absorbed"""


class RoundGate:
    """Rounds of one chunk. ``too_late`` is told of every late contribution, which is never applied."""

    def __init__(
        self, mode: Mode, members: Awaited, chunk: Versioned, too_late: Callable[[Contribution], None]
    ) -> None:
        self._backup = mode.backup
        self._members = members
        self._chunk = chunk
        self._too_late = too_late
        self._queues: dict[int, deque[Contribution]] = {}
        self._orphans: deque[Contribution] = deque()
        """what waited here of workers whose slot another one has now; the next round takes it"""
        self._answered: dict[int, int] = {}
        """slot → the number of its last contribution that was applied, or was late"""

    def offer(self, contribution: Contribution) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        self._queues.setdefault(contribution.slot, deque()).append(contribution)
        return self.members_changed()

    def members_changed(self) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        rounds: list[list[Contribution]] = []
        self._sort_out(self._chunk.version)
        while self._complete():
            heads = [queue.popleft() for queue in self._queues.values() if queue]
            for head in heads:
                self._answered[head.slot] = head.seq
            heads += self._orphans
            self._orphans.clear()
            rounds.append(sorted(heads, key=lambda c: c.slot))
            self._sort_out(self._chunk.version + len(rounds))
        return rounds

    def _complete(self) -> bool:
        if not self._orphans and not any(self._queues.values()):
            return False
        awaited = self._members.awaited()
        here = sum(1 for slot in awaited if self._queues.get(slot))
        return here >= (max(1, len(awaited) - self._backup) if awaited else 0)

    def _sort_out(self, version: int) -> None:
        """Drop what is late in a round that changes this version."""
        if not self._backup:
            return
        for slot, queue in self._queues.items():
            while queue and queue[0].base_version < version:
                late = queue.popleft()
                self._answered[slot] = late.seq
                self._too_late(late)
        while self._orphans and self._orphans[0].base_version < version:
            self._too_late(self._orphans.popleft())

    def joined(self, slots: Collection[int]) -> None:
        """See :class:`downpour_server.policy.Gate`; what a predecessor left in the queue still counts."""
        for slot in slots:
            self._orphans += self._queues.pop(slot, ())
            self._answered.pop(slot, None)

    def own(self, slot: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        for contribution in self._queues.get(slot, ()):
            contribution.gradient = contribution.gradient.clone()

    def epoch_over(self) -> None:
        """See :class:`downpour_server.policy.Gate`; numbers go on here."""

    def reached(self, slot: int, seq: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        self._answered[slot] = max(self._answered.get(slot, -1), seq - 1)

    def clock_of(self, _slot: int) -> int:
        """Not counted: whoever joins begins with the open round, and numbers as it likes."""
        return 0

    def may_answer(self, slot: int, seq: int) -> bool:
        """See :class:`downpour_server.policy.Gate`."""
        return self._answered.get(slot, -1) >= seq

    def waits_for(self, _slot: int, _seq: int) -> list[int]:
        """See :class:`downpour_server.policy.Gate`."""
        return [slot for slot in self._members.awaited() if not self._queues.get(slot)]

    def clock_gap(self, _slot: int, _seq: int) -> int:
        """Zero: all are answered together."""
        return 0

    def waiting(self) -> list[tuple[int, int]]:
        """See :class:`downpour_server.policy.Gate`."""
        return [(c.slot, c.seq) for queue in self._queues.values() for c in queue]
