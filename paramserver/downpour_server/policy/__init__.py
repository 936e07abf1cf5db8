"""Policies: *when* contributions are applied and pulls answered. A new one is one file and one line here.

Each chunk has its own :class:`Gate`, so chunks of one push stream through independently, and parameter groups may have
policies of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Awaited
from downpour_server.policy import asynchronous, exchanges, rounds, stale, synchronous
from downpour_server.policy.rounds import Versioned

Round = list[Contribution]
"""Contributions that are applied as one update, in the order in which they are reduced."""


class Gate(Protocol):
    """The policy of one chunk. Contributions of one slot arrive in the order of their ``seq``."""

    def offer(self, contribution: Contribution) -> list[Round]:
        """A contribution has arrived; returns the updates that are due now, in order."""

    def members_changed(self) -> list[Round]:
        """The awaited slots have changed; returns the updates that are due now, in order."""

    def joined(self, slots: Collection[int]) -> None:
        """New workers are in these slots, and counted among the members; they have contributed nothing yet."""

    def own(self, slot: int) -> None:
        """Memory of ``slot``'s worker may change from now on: what waits here and lies in it is to be copied."""

    def epoch_over(self) -> None:
        """All have ended their epoch, and nothing waits here; numbers of contributions begin anew at the version."""

    def reached(self, slot: int, seq: int) -> None:
        """``slot`` has contributed all below ``seq`` to a shard whose place this one has taken."""

    def clock_of(self, slot: int) -> int:
        """Clocks that ``slot`` counts as having completed, those from before it joined included; 0 where none count."""

    def may_answer(self, slot: int, seq: int) -> bool:
        """Whether the fetch that came with contribution ``seq`` of ``slot`` may be answered now."""

    def waits_for(self, slot: int, seq: int) -> list[int]:
        """The slots whose contributions that fetch is waiting for."""

    def clock_gap(self, slot: int, seq: int) -> int:
        """Clocks by which ``slot``, having completed ``seq``, is ahead of the slowest awaited one."""

    def waiting(self) -> Collection[tuple[int, int]]:
        """Slot and number of each contribution of a present worker that has come and is not applied yet."""


GateFactory = Callable[[Mode, Awaited, Versioned, Callable[[Contribution], None]], Gate]


def _rounds(mode: Mode, members: Awaited, chunk: Versioned, too_late: Callable[[Contribution], None]) -> Gate:
    """Rounds where not all is strictly synchronous: workers join and leave at any time."""
    gate = rounds.RoundGate if mode.backup else exchanges.ExchangeGate
    return gate(mode, members, chunk, too_late)


POLICIES: dict[str, GateFactory] = {
    "async": lambda mode, members, _chunk, _too_late: asynchronous.AsyncGate(mode, members),
    "ssp": lambda mode, members, _chunk, _too_late: stale.StaleGate(mode, members),
    "sync": _rounds,
    "average": exchanges.ExchangeGate,
    "diloco": exchanges.ExchangeGate,
    "easgd": lambda mode, members, _chunk, _too_late: asynchronous.AsyncGate(mode, members),
    "lbfgs": lambda mode, members, _chunk, _too_late: asynchronous.AsyncGate(mode, members),
}
"""By the name of the mode, for what is trained; strictly synchronous jobs have gates of their own."""


def gate_for(
    mode: Mode, group: int, members: Awaited, chunk: Versioned, too_late: Callable[[Contribution], None]
) -> Gate:
    """The gate of a chunk in a job of this mode: of parameter group ``group``, or of buffers and frozen tensors (-1).

    ``too_late`` is told of contributions that come after their round (``sync,backup=b``) and so are not applied.
    """
    if mode.synchronous:
        return synchronous.SyncGate(mode, members)
    if group < 0:
        return asynchronous.AsyncGate(mode, members)
    own = mode.of_group(group)
    return POLICIES[own.name](own, members, chunk, too_late)
