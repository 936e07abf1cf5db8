"""Rounds of ``average`` and ``diloco``: an exchange of every worker that takes part, once in ``h`` of its steps.

The number of a contribution names its round, the same on all chunks of all shards. A worker says from which number on
it takes part (:meth:`ExchangeGate.reached`), the largest that a shard has told it (:meth:`ExchangeGate.clock_of`);
until then nobody waits for it. So one that joins is awaited in the same round everywhere. Were it awaited by whatever
round each chunk happens to be at, some chunks would count its exchanges from the round before: it would wait there for
the others while they wait for it elsewhere, and they would compute in turns from then on; with fragments, which are
exchanged one after the other, nobody would go on at all.

A round is complete when every awaited worker that may still contribute to it has done so. What comes after its round
is *late*: it is answered at once, and counts with the next round. So whoever lags behind by one catches up while the
others wait; whoever lags by more is not waited for, and loses nothing but the others' company.

With one number, all workers go through all exchanges in one order, and each waits only for contributions that come
before its own next: there is no circle of workers that wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Awaited
from downpour_server.policy.rounds import Versioned


class ExchangeGate:
    """Rounds of one chunk."""

    def __init__(
        self, _mode: Mode, members: Awaited, _chunk: Versioned, _too_late: Callable[[Contribution], None]
    ) -> None:
        self._members = members
        self._queues: dict[int, deque[Contribution]] = {}
        self._late: deque[Contribution] = deque()
        """answered, and to be applied with the next round"""
        self._orphans: deque[Contribution] = deque()
        """as ``_late``, of workers whose slot another one has now"""
        self._next: dict[int, int] = {}
        """slot → the least number that it may still contribute"""
        self._absent: set[int] = set()
        """slots that are not waited for, until they say where they are"""
        self._over = 0
        """all rounds below this one are over"""
        self._answered: dict[int, int] = {}
        """slot → the number of its last contribution whose fetch may be answered"""

    def offer(self, contribution: Contribution) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        slot, seq = contribution.slot, contribution.seq
        self._next[slot] = max(self._next.get(slot, 0), seq + 1)
        if seq >= self._over:
            self._absent.discard(slot)
            self._queues.setdefault(slot, deque()).append(contribution)
        else:
            contribution.gradient = contribution.gradient.clone()  # its worker is answered before it is applied
            self._late.append(contribution)
            self._answered[slot] = seq
            if seq < self._over - 1:
                self._absent.add(slot)
        return self.members_changed()

    def members_changed(self) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        rounds: list[list[Contribution]] = []
        while round_ := self._due():
            rounds.append(sorted([*round_, *self._late, *self._orphans], key=lambda c: (c.slot, c.seq)))
            self._late.clear()
            self._orphans.clear()
        return rounds

    def _due(self) -> list[Contribution]:
        """Take the contributions of the open round if it is complete; empty if it is not."""
        awaited, heads = self._members.awaited(), [q[0].seq for q in self._queues.values() if q]
        if not awaited:  # all that is here is the last that comes for now
            return self._take(max((c.seq for q in self._queues.values() for c in q), default=-1)) or self._rest()
        if not heads or self._missing(open_ := min(heads), awaited):
            return []
        return self._take(open_)

    def _missing(self, number: int, awaited: Collection[int]) -> list[int]:
        """The awaited slots that this round waits for."""
        first = self._members.first_seq
        return [
            slot
            for slot in awaited
            if not self._queues.get(slot) and slot not in self._absent and self._next.get(slot, first) <= number
        ]

    def _take(self, number: int) -> list[Contribution]:
        """All contributions up to this number; the rounds up to it are over."""
        taken = []
        for slot, queue in self._queues.items():
            while queue and queue[0].seq <= number:
                taken.append(queue.popleft())
                self._answered[slot] = taken[-1].seq
        self._over = max(self._over, number + 1)
        return taken

    def _rest(self) -> list[Contribution]:
        """What was late for the last round there was."""
        rest = [*self._late, *self._orphans]
        self._late.clear()
        self._orphans.clear()
        return rest

    def joined(self, slots: Collection[int]) -> None:
        """See :class:`downpour_server.policy.Gate`; what a predecessor left here still counts."""
        for slot in slots:
            self._orphans += [*(c for c in self._late if c.slot == slot), *self._queues.pop(slot, ())]
            self._late = deque(c for c in self._late if c.slot != slot)
            self._next.pop(slot, None)
            self._answered.pop(slot, None)
            self._absent.add(slot)

    def own(self, slot: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        for contribution in self._queues.get(slot, ()):
            contribution.gradient = contribution.gradient.clone()

    def epoch_over(self) -> None:
        """See :class:`downpour_server.policy.Gate`; numbers go on here."""

    def reached(self, slot: int, seq: int) -> None:
        """See :class:`downpour_server.policy.Gate`; from now on it is waited for."""
        self._next[slot] = max(self._next.get(slot, 0), seq)
        self._answered[slot] = max(self._answered.get(slot, -1), seq - 1)
        self._absent.discard(slot)

    def clock_of(self, slot: int) -> int:
        """The round that is open, counted from the job's first: in it ``slot`` may begin, or begin again."""
        heads = [queue[0].seq for queue in self._queues.values() if queue]
        others = [self._next[s] for s in self._members.awaited() if s != slot and s in self._next]
        open_ = min(heads) if heads else max(self._over, min(others, default=0))
        return max(0, open_ - self._members.first_seq)

    def may_answer(self, slot: int, seq: int) -> bool:
        """See :class:`downpour_server.policy.Gate`."""
        return self._answered.get(slot, -1) >= seq

    def waits_for(self, _slot: int, seq: int) -> list[int]:
        """See :class:`downpour_server.policy.Gate`."""
        return self._missing(seq, self._members.awaited())

    def clock_gap(self, _slot: int, _seq: int) -> int:
        """Zero: all are answered together."""
        return 0

    def waiting(self) -> list[tuple[int, int]]:
        """See :class:`downpour_server.policy.Gate`."""
        return [(c.slot, c.seq) for c in (*(c for queue in self._queues.values() for c in queue), *self._late)]
