"""The listening side of ``downpour bench net``: answers with the messages of a shard, and keeps nothing.

The conversation is that of a worker and a shard, with messages of the data plane (``job``: a random token of the
measurement, ``digest``: :data:`FORMAT`)::

    Hello     → HelloReply                                   a round trip; the first one begins the measurement
    Push      → Ack                                          a chunk there
    Pull      → Weights of ``chunk`` KiB                     a chunk back
    PushPull  → Weights of as many bytes as came             both ways
    Leave     → Ack                                          the measurement is over

There is one measurement at a time, as two would disturb each other. One that says nothing for :data:`IDLE_S` is over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from downpour_common import messages as m
from downpour_common.messages import Message, Refusal

FORMAT = "downpour-bench-net-1"
"""Both sides must mean the same by the same messages."""
LARGEST_BYTES = 8 << 20
"""Larger chunks are neither taken nor sent."""
IDLE_S = 15.0
CONTENT_BYTES = 32 << 20
"""More than caches hold for themselves, as in a real model."""


def content() -> memoryview:
    """Bytes to send: nothing on the way can compress them."""
    return memoryview(os.urandom(1 << 20) * (CONTENT_BYTES >> 20))


class Slices:
    """Parts of :func:`content`, one after the other. Nothing is allocated: what waits to be sent shares one memory."""

    def __init__(self) -> None:
        self._content = content()
        self._at = 0

    def next(self, nbytes: int) -> memoryview:
        """The next ``nbytes``, at most :data:`LARGEST_BYTES`."""
        if self._at + nbytes > len(self._content):
            self._at = 0
        self._at += nbytes
        return self._content[self._at - nbytes : self._at]


@dataclass(slots=True)
class Measurement:
    """One that is under way. ``bytes_in`` and ``bytes_out`` count payloads."""

    token: str
    heard_s: float
    bytes_in: int = 0
    bytes_out: int = 0


class Answerer:
    """State of the listening side; time comes in with each message and is only compared with itself."""

    def __init__(self) -> None:
        self.current: Measurement | None = None
        self.finished: list[Measurement] = []
        """those that are over; the caller takes them away"""
        self._slices = Slices()

    def handle(self, message: Message, now_s: float) -> Message | None:
        """The answer to ``message``; None for one that has no place here."""
        self.tick(now_s)
        if not isinstance(message, m.Hello | m.Push | m.Pull | m.PushPull | m.Leave):
            return None
        if isinstance(message, m.Hello) and message.digest != FORMAT:
            reason = "here listens `downpour bench net`, of another version perhaps"
            return m.Refused(message.request, Refusal.MODEL_DIFFERS.value, reason)
        if self.current is None and isinstance(message, m.Hello):
            self.current = Measurement(message.job, now_s)
        current = self.current
        if current is None or current.token != message.job:
            reason = "no measurement has begun" if current is None else "another measurement is under way"
            return m.Refused(message.request, Refusal.NOT_READY.value, reason)
        current.heard_s = now_s
        return self._answer(message, current)

    def tick(self, now_s: float) -> None:
        """Give up a measurement whose other side has gone."""
        if self.current is not None and now_s - self.current.heard_s > IDLE_S:
            self._end(self.current)

    def _answer(self, message: m.Hello | m.Push | m.Pull | m.PushPull | m.Leave, current: Measurement) -> Message:
        match message:
            case m.Hello():
                return m.HelloReply(message.request, 0, 0, 0)
            case m.Leave():
                self._end(current)
                return m.Ack(message.request, 0)
            case m.Push() | m.PushPull():
                nbytes = len(message.payload)
            case m.Pull():
                nbytes = message.chunk << 10
        if not 0 <= nbytes <= LARGEST_BYTES:
            return m.Refused(message.request, Refusal.TOO_LARGE.value, f"at most {LARGEST_BYTES} bytes")
        if not isinstance(message, m.Pull):
            current.bytes_in += nbytes
        if isinstance(message, m.Push):
            return m.Ack(message.request, 0)
        current.bytes_out += nbytes
        return m.Weights(message.request, message.chunk, 0, self._slices.next(nbytes))

    def _end(self, measurement: Measurement) -> None:
        self.finished.append(measurement)
        self.current = None
