"""Sending a file to the coordinator's host, as a state machine: which bytes to send when. No socket, clock or file.

Parts go in order, a few at a time. The coordinator answers each with the bytes that it holds, and that is where the
upload goes on, forwards or backwards: so it may be restarted, and parts may be lost. While it is silent nothing but a
small question is repeated, because ZeroMQ keeps what is sent to a peer that is away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PART_BYTES = 1 << 20
WINDOW = 4
"""Parts without an answer at most."""
ASK_S = 2.0
"""Silence after which it is asked what is held."""
STUCK = 8
"""Answers in a row that bring nothing new, before the upload is given up."""


@dataclass(frozen=True, slots=True)
class Part:
    """Effect: send the file's bytes ``offset`` to ``offset + length``; 0 bytes only ask what is held."""

    request: int
    offset: int
    length: int


class Upload:
    """One file of ``total`` bytes. ``numbers`` gives fresh request numbers. Ends with ``done`` or an ``error``."""

    def __init__(self, total: int, numbers: Iterator[int]) -> None:
        self.error = ""
        self._total = total
        self._numbers = numbers
        self._held = 0
        self._next = 0
        self._in_flight: dict[int, int] = {}
        """request → where its part ends"""
        self._question = 0
        """request of the question that is not answered yet; 0: there is none"""
        self._heard_s = 0.0
        """last answer, or first part sent after all were answered"""
        self._stuck = 0

    @property
    def done(self) -> bool:
        """Whether the coordinator holds the whole file."""
        return not self.error and self._held >= self._total

    def outgoing(self, now_s: float) -> list[Part]:
        """What to send now, in order."""
        if self.error or self.done:
            return []
        if (self._in_flight or self._question) and now_s - self._heard_s >= ASK_S:
            self._in_flight.clear()
            self._question = self._question or next(self._numbers)
            self._heard_s = now_s
            return [Part(self._question, self._held, 0)]
        parts: list[Part] = []
        if self._question:
            return parts
        if not self._in_flight:
            self._heard_s = now_s
        while len(self._in_flight) < WINDOW and self._next < self._total:
            part = Part(next(self._numbers), self._next, min(PART_BYTES, self._total - self._next))
            self._next += part.length
            self._in_flight[part.request] = self._next
            parts.append(part)
        return parts

    def acknowledged(self, request: int, held: int, now_s: float) -> None:
        """The coordinator has answered ``request``: it holds ``held`` bytes. Late answers change nothing."""
        end = self._in_flight.pop(request, -1)
        if end < 0 and request != self._question:
            return
        if not 0 <= held <= self._total:
            self.error = f"the coordinator holds {held} bytes of a file of {self._total}"
            return
        self._stuck = 0 if held > self._held else self._stuck + 1
        if self._stuck > STUCK:
            self.error = f"the coordinator takes no more than {held} of {self._total} bytes"
        self._heard_s = now_s
        self._held = held
        if held == end:
            self._in_flight = {r: e for r, e in self._in_flight.items() if e > held}
        else:
            self._question = 0
            self._in_flight.clear()
            self._next = held

    def refused(self, request: int, reason: str) -> None:
        """The coordinator does not want ``request``, so it does not want the file."""
        if request == self._question or request in self._in_flight:
            self.error = f"the coordinator refused it: {reason}"
