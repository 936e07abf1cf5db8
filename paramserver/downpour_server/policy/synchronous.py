"""``sync``: an update is one contribution of every awaited worker, in slot order; then all are answered.

A slot's contributions queue up in the order it sent them. The open round is complete when every awaited slot
has one queued; it takes the head of every queue, those of slots that have ended or left included. Which
contributions meet in a round therefore follows from what the workers do alone, never from timing. Workers join
between two passes, when nothing is queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Awaited


class SyncGate:
    """Rounds of one chunk."""

    def __init__(self, _mode: Mode, members: Awaited) -> None:
        self._members = members
        self._queues: dict[int, deque[Contribution]] = {}
        self._applied: dict[int, int] = {}

    def offer(self, contribution: Contribution) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        self._queues.setdefault(contribution.slot, deque()).append(contribution)
        return self.members_changed()

    def members_changed(self) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        rounds = []
        while any(self._queues.values()) and all(self._queues.get(slot) for slot in self._members.awaited()):
            heads = [self._queues[slot].popleft() for slot in sorted(self._queues) if self._queues[slot]]
            for head in heads:
                self._applied[head.slot] = head.seq
            rounds.append(heads)
        return rounds

    def joined(self, slots: Collection[int]) -> None:
        """See :class:`downpour_server.policy.Gate`; what a predecessor left in the queue is dropped."""
        for slot in slots:
            self._queues.pop(slot, None)
            self._applied.pop(slot, None)

    def own(self, slot: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        for contribution in self._queues.get(slot, ()):
            contribution.gradient = contribution.gradient.clone()

    def epoch_over(self) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        self._applied.clear()

    def reached(self, _slot: int, _seq: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def clock_of(self, _slot: int) -> int:
        """Not counted: a round waits for all."""
        return 0

    def may_answer(self, slot: int, seq: int) -> bool:
        """See :class:`downpour_server.policy.Gate`."""
        return self._applied.get(slot, -1) >= seq

    def waits_for(self, _slot: int, _seq: int) -> list[int]:
        """See :class:`downpour_server.policy.Gate`."""
        return [slot for slot in self._members.awaited() if not self._queues.get(slot)]

    def clock_gap(self, _slot: int, _seq: int) -> int:
        """Zero by construction."""
        return 0

    def waiting(self) -> list[tuple[int, int]]:
        """See :class:`downpour_server.policy.Gate`."""
        return [(c.slot, c.seq) for queue in self._queues.values() for c in queue]
