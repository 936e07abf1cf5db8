"""``ssp:s``: applied on arrival, answered when the slowest awaited worker is at most s clocks behind.

Stale synchronous parallel (Ho et al. 2013). A worker's clock on a chunk is the number of its contributions to
it. Its fetch after contribution ``seq`` completes clock ``seq + 1`` (counted from the job's start clock), and
is held back until min(clock) ≥ seq + 1 − s; so no worker is ever more than s completed clocks ahead of another.
"""

from __future__ import annotations

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Members


class StaleGate:
    """Counts clocks per slot."""

    def __init__(self, mode: Mode, members: Members) -> None:
        self._bound = mode.staleness
        self._members = members
        self._first: dict[int, int] = {}
        self._done: dict[int, int] = {}

    def offer(self, contribution: Contribution) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        self._first.setdefault(contribution.slot, contribution.seq)
        self._done[contribution.slot] = contribution.seq + 1 - self._first[contribution.slot]
        return [[contribution]]

    def members_changed(self) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        return []

    def may_answer(self, slot: int, seq: int) -> bool:
        """See :class:`downpour_server.policy.Gate`."""
        return self.clock_gap(slot, seq) <= self._bound

    def waits_for(self, slot: int, seq: int) -> list[int]:
        """See :class:`downpour_server.policy.Gate`."""
        needed = self._clock(slot, seq) - self._bound
        return [other for other in self._members.awaited() if self._done.get(other, 0) < needed]

    def clock_gap(self, slot: int, seq: int) -> int:
        """See :class:`downpour_server.policy.Gate`."""
        slowest = min((self._done.get(other, 0) for other in self._members.awaited()), default=None)
        return 0 if slowest is None else self._clock(slot, seq) - slowest

    def _clock(self, slot: int, seq: int) -> int:
        return seq + 1 - self._first.get(slot, seq + 1)
