"""``async``: applied on arrival, answered at once (Downpour SGD, Dean et al. 2012, section 4.1)."""

from __future__ import annotations

from collections.abc import Collection

from downpour_common.modes import Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Awaited


class AsyncGate:
    """Nobody waits for anybody."""

    def __init__(self, _mode: Mode, _members: Awaited) -> None:
        pass

    def offer(self, contribution: Contribution) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        return [[contribution]]

    def members_changed(self) -> list[list[Contribution]]:
        """See :class:`downpour_server.policy.Gate`."""
        return []

    def joined(self, _slots: Collection[int]) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def own(self, _slot: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def epoch_over(self) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def reached(self, _slot: int, _seq: int) -> None:
        """See :class:`downpour_server.policy.Gate`."""

    def clock_of(self, _slot: int) -> int:
        """Not counted: nobody waits for it."""
        return 0

    def may_answer(self, _slot: int, _seq: int) -> bool:
        """See :class:`downpour_server.policy.Gate`."""
        return True

    def waits_for(self, _slot: int, _seq: int) -> list[int]:
        """See :class:`downpour_server.policy.Gate`."""
        return []

    def clock_gap(self, _slot: int, _seq: int) -> int:
        """Not measured: nothing bounds it."""
        return 0

    def waiting(self) -> list[tuple[int, int]]:
        """None: all are applied at once."""
        return []
