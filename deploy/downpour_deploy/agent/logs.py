"""Delivery of one process' output, from the file that it is written to. I/O-free.

Nothing is lost: the file stays until the job is forgotten, and what counts as delivered is what the coordinator says
that it holds. After an answer that falls short, or none within :data:`REPEAT_S`, delivery goes back to what is held.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from downpour_deploy.agent.effects import Numbers

PART_BYTES = 256 << 10
"""Largest part in one message."""
WINDOW = 2
"""Parts under way."""
REPEAT_S = 2.0


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of the log from ``offset`` on, to be sent as request ``request``."""

    request: int
    offset: int
    length: int


class LogFeed:
    """How far one process' output has come."""

    def __init__(self) -> None:
        self.size = 0
        self.complete = False
        self._abandoned = False
        self._held = 0
        self._next = 0
        self._under_way: deque[tuple[Part, float]] = deque()

    @property
    def delivered(self) -> bool:
        """Whether the process has ended and the coordinator holds all it wrote (or does not want it)."""
        return self.complete and (self._abandoned or self._held >= self.size)

    def grew(self, size: int, complete: bool = False) -> None:
        """The file has ``size`` bytes now; ``complete``: and will have no more."""
        self.size = max(self.size, size)
        self.complete |= complete

    def abandon(self) -> None:
        """Nobody wants the rest, or it cannot be read."""
        self._abandoned = True
        self._under_way.clear()

    def asked(self, request: int) -> bool:
        """Whether this request is a part under way."""
        return any(part.request == request for part, _ in self._under_way)

    def due(self, numbers: Numbers, now_s: float, flush: bool) -> list[Part]:
        """Parts to send now; ``flush``: small ones as well, else only whole parts and the last."""
        if self._under_way and now_s - self._under_way[0][1] >= REPEAT_S:
            self.start_over()
        parts: list[Part] = []
        if self._abandoned:
            return parts
        while len(self._under_way) < WINDOW and self._next < self.size:
            length = min(PART_BYTES, self.size - self._next)
            if length < PART_BYTES and not (flush or self.complete):
                break
            part = Part(numbers.new(), self._next, length)
            self._under_way.append((part, now_s))
            self._next += length
            parts.append(part)
        return parts

    def start_over(self) -> None:
        """What is under way counts as lost."""
        self._under_way.clear()
        self._next = self._held

    def answered(self, request: int, held: int) -> None:
        """The coordinator holds ``held`` bytes after taking the part that was this request, which is under way."""
        while True:  # those before it were sent before it: they arrived before it, or never will
            part = self._under_way.popleft()[0]
            if part.request == request:
                break
        self._held = min(held, self.size)
        if held != part.offset + part.length:
            self.start_over()
