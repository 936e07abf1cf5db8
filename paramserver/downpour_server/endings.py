"""Workers that have ended their epoch, and wait to hear that all have."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common import messages as m
from downpour_common.messages import Refusal
from downpour_common.transport import Peer
from downpour_server.common import Common
from downpour_server.effects import Effect, Reply


@dataclass(frozen=True, slots=True)
class Ending:
    """An EndEpoch that is not answered yet."""

    peer: Peer
    request: int
    slot: int
    since_s: float


class Endings:
    """All of them, in the order in which they came."""

    def __init__(self, common: Common) -> None:
        self._members = common.members
        self._refusals = common.refusals
        self.waiting: list[Ending] = []

    def clear(self) -> None:
        """None waits here any more; nobody is told."""
        self.waiting.clear()

    def answer(self, round_: int, effects: list[Effect]) -> None:
        """All have ended; the next contributions are meant for ``round_``."""
        effects.extend(Reply(entry.peer, m.Ack(entry.request, round_)) for entry in self.waiting)
        self.waiting.clear()

    def dismiss(self, slot: int, reason: str, effects: list[Effect]) -> None:
        """Refuse those of the worker that was in ``slot``."""
        for entry in self.waiting:
            if entry.slot == slot:
                self._refusals.refuse(entry.peer, entry.request, Refusal.STALE_EPOCH, reason, effects)
        self.waiting = [entry for entry in self.waiting if entry.slot != slot]

    def overdue(self, now_s: float, timeout_s: float, effects: list[Effect]) -> None:
        """Refuse what has waited for longer than ``timeout_s``, naming whom it waits for."""
        for entry in [entry for entry in self.waiting if now_s - entry.since_s > timeout_s]:
            self.waiting.remove(entry)
            names = ", ".join(f"worker/{slot}" for slot in self._members.awaited())
            reason = f"after {timeout_s:g} s still waiting for {names} to end the epoch"
            self._refusals.refuse(entry.peer, entry.request, Refusal.TIMED_OUT, reason, effects)
