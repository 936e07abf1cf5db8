"""``ssp:s``: applied on arrival, answered when the slowest awaited worker is at most s clocks behind.

Stale synchronous parallel (Ho et al. 2013). A worker's fetch after contribution ``seq`` completes clock ``seq + 1``,
counted from the job's first ``seq``, and is held back until min(clock) ≥ its clock − s; so no worker is ever more
than s completed clocks ahead of another.

A worker that joins later begins where the slowest of the others is, so nobody waits for it to catch up. Gates hear of
it at different moments, on other shards especially, and would give it different clocks; it would then wait for the
others on one chunk while they wait for it on another, for ever. Therefore it is told the largest of them
(:meth:`StaleGate.clock_of`) and numbers its contributions from there, the same on all chunks of all shards. Until its
first contribution to a chunk the smaller clock stands there; so it sends that to all chunks before it awaits an answer.

Where one takes its first steps alone (:meth:`StaleGate.let_lead`), all others count as being where these end, and begin
there.
"""

from __future__ import annotations

from collections.abc import Collection

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Awaited


class StaleGate:
    """Counts clocks per slot."""

    def __init__(self, mode: Mode, members: Awaited) -> None:
        self._bound = mode.staleness
        self._members = members
        self._done: dict[int, int] = {}
        self._lead: tuple[int, int] = (0, 0)

    def let_lead(self, slots: int, clock: int) -> None:
        """The workers of the first ``slots`` slots are alone until this clock of the job."""
        self._lead = (slots, clock)

    def offer(self, contribution: Contribution) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        self._done[contribution.slot] = max(self.clock_of(contribution.slot), self._clock(contribution.seq))
        return [[contribution]]

    def members_changed(self) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        return []

    def joined(self, slots: Collection[int]) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        others = [self.clock_of(slot) for slot in self._members.awaited() if slot not in slots]
        base = min(others) if others else max(self._done.values(), default=0)
        for slot in slots:
            self._done[slot] = base

    def own(self, _slot: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def epoch_over(self) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def reached(self, slot: int, seq: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""
        self._done[slot] = max(self.clock_of(slot), seq - self._members.first_seq)

    def clock_of(self, slot: int) -> int:
        """See :class:`downpour_server.policy.Gate`."""
        slots, clock = self._lead
        first = clock - self._members.first_seq if slot >= slots else 0
        return max(first, self._done.get(slot, 0))

    def may_answer(self, slot: int, seq: int) -> bool:
        """See :class:`downpour_server.policy.Gate`."""
        return self.clock_gap(slot, seq) <= self._bound

    def waits_for(self, _slot: int, seq: int) -> list[int]:
        """See :class:`downpour_server.policy.Gate`."""
        needed = self._clock(seq) - self._bound
        return [other for other in self._members.awaited() if self.clock_of(other) < needed]

    def clock_gap(self, _slot: int, seq: int) -> int:
        """See :class:`downpour_server.policy.Gate`."""
        slowest = min((self.clock_of(other) for other in self._members.awaited()), default=None)
        return 0 if slowest is None else self._clock(seq) - slowest

    def waiting(self) -> list[tuple[int, int]]:
        """None: all are applied at once."""
        return []

    def _clock(self, seq: int) -> int:
        return seq + 1 - self._members.first_seq
