"""The asking side of ``downpour bench net``: round trips, and streams of chunks one way and both ways."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from downpour_common import messages as m
from downpour_common.errors import DownpourError
from downpour_common.messages import Message, Request
from downpour_common.transport import ClientTransport
from downpour_deploy.bench.answer import FORMAT, Slices

CHUNKS = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20)
"""Sizes of chunks that are tried, bytes."""
RUNS = 3
"""Streams per size and way; the median counts."""
TRIPS, TRIPS_S = 300, 2.0
"""Round trips that are measured: so many, or as long."""
LEAST_TRIPS = 5
SLOW_CHUNK_S = 0.5
"""Sizes of which one chunk takes longer than that are left out."""
AHEAD_S = 1.0
"""No more is under way than takes about so long, so that a slow link answers within the deadline."""

Way = Literal["there", "back", "both"]
WAYS: tuple[Way, ...] = ("there", "back", "both")


class LinkError(DownpourError):
    """The other side does not answer, or not as it should; ``code`` is the command's exit code."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


class Silence(DownpourError):
    """Nothing has come for as long as was to be waited."""


class Refusal(DownpourError):
    """The other side will not; ``code`` is a :class:`downpour_common.messages.Refusal`."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Point:
    """Chunks of one size: bytes per second there, back, and both ways together (both directions counted)."""

    chunk_bytes: int
    there: float
    back: float
    both: float


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured. ``round_trips_s`` ascend."""

    round_trips_s: tuple[float, ...]
    points: tuple[Point, ...]
    window_bytes: int


class Link:
    """One measurement over ``transport``. Every wait ends after ``timeout_s`` without an answer: :class:`Silence`."""

    def __init__(
        self,
        transport: ClientTransport,
        server: str,
        timeout_s: float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._transport = transport
        self._server = server
        self._timeout_s = timeout_s
        self._now = now
        self._token = secrets.token_hex(8)
        self._number = 0
        self._open: dict[int, int] = {}
        self._slices = Slices()

    def greet(self, wait_s: float) -> bool:
        """Say hello once more; whether there was an answer within ``wait_s``. Raises :class:`Refusal`."""
        self._open.clear()
        self._send(m.Hello(self._next(), self._token, 0, 0, FORMAT), -1)
        deadline_s = self._now() + wait_s
        while (left_s := deadline_s - self._now()) > 0:
            if self._take(left_s):
                return True
        return False

    def leave(self) -> None:
        """The measurement is over; the other side is free for the next."""
        self._send(m.Leave(self._next(), self._token, 0, 0), -1)
        self._await_one()

    def round_trip(self) -> float:
        """Seconds of one tiny message there and its answer back."""
        began_s = self._now()
        self._send(m.Hello(self._next(), self._token, 0, 0, FORMAT), -1)
        self._await_one()
        return self._now() - began_s

    def stream(self, way: Way, chunk_bytes: int, chunks: int, window_bytes: int) -> float:
        """Seconds from the first of ``chunks`` chunks to the last answer, at most ``window_bytes`` under way."""
        most = max(2, window_bytes // chunk_bytes)
        began_s = self._now()
        left = chunks
        while left or self._open:
            while left and len(self._open) < most:
                self._send(*self._chunk(way, chunk_bytes))
                left -= 1
            self._await_one()
        return self._now() - began_s

    def _chunk(self, way: Way, nbytes: int) -> tuple[Request, int]:
        number, token = self._next(), self._token
        if way == "back":
            return m.Pull(number, token, 0, 0, nbytes >> 10), nbytes
        kind = m.Push if way == "there" else m.PushPull
        payload = self._slices.next(nbytes)
        return kind(number, token, 0, 0, 0, number, 0, 0, 1, (), b"", payload), -1 if way == "there" else nbytes

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _send(self, message: Request, expected: int) -> None:
        """``expected``: bytes of the answer's payload; -1: it has none."""
        self._open[message.request] = expected
        self._transport.send(self._server, message)

    def _await_one(self) -> None:
        """At least one answer."""
        deadline_s = self._now() + self._timeout_s
        while not self._take(max(0.0, deadline_s - self._now())):
            if self._now() >= deadline_s:
                raise Silence(f"no answer within {self._timeout_s:g} s")

    def _take(self, wait_s: float) -> int:
        """Answers that have come, awaited at most ``wait_s``."""
        return sum(self._is_answer(message) for _, message in self._transport.poll(wait_s))

    def _is_answer(self, message: Message) -> bool:
        if not isinstance(message, Request) or message.request not in self._open:
            return False
        if isinstance(message, m.Refused):
            raise Refusal(message.code, message.reason)
        expected = self._open.pop(message.request)
        found = len(message.payload) if isinstance(message, m.Weights) else -1
        if found != expected:
            raise Refusal("", f"an answer of {found} bytes instead of {expected}")
        return True


def measure(link: Link, seconds: float, window_bytes: int, sizes: Sequence[int] = CHUNKS) -> Found:
    """Measure everything, for about ``seconds`` on a link that is not very slow.

    ``window_bytes``: what a worker has under way at most. Sizes take turns, so that drift hits all alike.
    """
    trips_s = _round_trips(link)
    run_s = seconds / (len(sizes) * len(WAYS) * (RUNS + 1))
    rates = {way: _first_rate(link, way, min(sizes), run_s) for way in WAYS}
    kept = [size for size in sizes if size <= min(rates.values()) * SLOW_CHUNK_S] or [min(sizes)]
    window_bytes = int(min(window_bytes, max(2 * kept[-1], min(rates.values()) * AHEAD_S)))
    samples: dict[tuple[int, Way], list[float]] = {(size, way): [] for size in kept for way in WAYS}
    for _ in range(RUNS):
        for (size, way), found in samples.items():
            chunks = max(4, round(rates[way] * run_s / size))
            moved = chunks * size * (2 if way == "both" else 1)
            found.append(moved / link.stream(way, size, chunks, window_bytes))
            rates[way] = found[-1]
    points = tuple(Point(size, *(median(samples[size, way]) for way in WAYS)) for size in kept)
    return Found(tuple(sorted(trips_s)), points, window_bytes)


def _round_trips(link: Link) -> list[float]:
    for _ in range(3):
        link.round_trip()
    trips_s: list[float] = []
    while len(trips_s) < LEAST_TRIPS or (len(trips_s) < TRIPS and sum(trips_s) < TRIPS_S):
        trips_s.append(link.round_trip())
    return trips_s


def _first_rate(link: Link, way: Way, size: int, run_s: float) -> float:
    """About how many bytes per second; more and more chunks until it takes long enough to tell. Warms up, too."""
    chunks = 2
    while True:
        took_s = link.stream(way, size, chunks, 4 * size)
        rate = chunks * size / max(took_s, 1e-9)
        if took_s > run_s / 2 or chunks >= 4096:
            return rate
        chunks *= 2
