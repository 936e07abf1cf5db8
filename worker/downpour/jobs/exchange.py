"""Which requests are open, when each is to be sent again, and for how long nobody has answered. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages import Message, Request

REPEAT_S = 2.0
"""Time without any answer after which open requests are sent again, with the same numbers."""


@dataclass(slots=True)
class _Open:
    request: Request
    due_s: float


class Exchange:
    """Requests of one client to one coordinator. Times in seconds of the caller's monotonic clock.

    Delivery: a request is sent until it is answered, so it may arrive more than once; its number is the same each
    time, and the coordinator does a request once. Answers to numbers that are not open are dropped.
    """

    def __init__(self, first_number: int) -> None:
        self._next = first_number
        self._open: dict[int, _Open] = {}
        self._quiet_since_s: float | None = None

    def number(self) -> int:
        """A number that no request had."""
        self._next += 1
        return self._next

    def add(self, request: Request, now_s: float) -> None:
        """``request`` is to be sent, at once and until it is answered."""
        if not self._open:
            self._quiet_since_s = now_s
        self._open[request.request] = _Open(request, now_s)

    def due(self, now_s: float) -> list[Request]:
        """What is to be sent now."""
        found = [entry for entry in self._open.values() if entry.due_s <= now_s]
        for entry in found:
            entry.due_s = now_s + REPEAT_S
        return [entry.request for entry in found]

    def take(self, message: Message, now_s: float) -> Request | None:
        """An answer has come: the request that it closes, or None for one that is not (any longer) open."""
        if not isinstance(message, Request):
            return None
        entry = self._open.pop(message.request, None)
        if entry is None:
            return None
        self._quiet_since_s = now_s
        # Answers come in order over one connection, so the others are on their way: repeating them now would have a
        # slow link carry everything twice.
        for other in self._open.values():
            if other.due_s > now_s:
                other.due_s = now_s + REPEAT_S
        return entry.request

    def again(self, request: Request, now_s: float) -> None:
        """The coordinator cannot answer ``request`` yet: ask again later."""
        self._open[request.request] = _Open(request, now_s + REPEAT_S)

    def resend(self) -> None:
        """The connection is a new one: everything open is due."""
        for entry in self._open.values():
            entry.due_s = float("-inf")

    def drop(self) -> None:
        """Nobody waits for the open requests any longer."""
        self._open.clear()

    def silent_s(self, now_s: float) -> float:
        """For how long something has been open without any answer."""
        return 0.0 if not self._open or self._quiet_since_s is None else now_s - self._quiet_since_s

    def wait_s(self, now_s: float) -> float:
        """Time until something is due; infinite when nothing is open."""
        return max(0.0, min((entry.due_s for entry in self._open.values()), default=float("inf")) - now_s)
