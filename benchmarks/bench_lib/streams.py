"""What bare ZeroMQ can do at best, with messages of 1 MB between two processes: a one-way stream, and an echo.

Nothing is decoded, kept or applied. Stream: the receiver drops each message and acknowledges once, at the end; the
clock is the sender's, from its first send to that acknowledgement. Echo: each message is answered at once by one as
large, always of the same memory; the clock is the asking side's, from its first send to the last answer. So it is the
limit of a push and pull: both directions share the connection, the cores and the I/O threads.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import zmq

from bench_lib.child import RunOnce, Tell, Worker
from bench_lib.contender import MB, ContenderError, Spec
from bench_lib.crew import Crew

MESSAGE_BYTES = MB
BEGIN, READY = b"begin", b"ready"

Transport = Literal["ipc", "tcp"]


class PairContender:
    """Two processes of one connection: ``binds`` runs in the one that listens, ``connects`` in the one that times."""

    def __init__(self, name: str, spec: Spec, transport: Transport, binds: Worker, connects: Worker) -> None:
        self.name = name
        self._spec = spec
        self._transport = transport
        self._binds, self._connects = binds, connects
        self._crew = Crew(name, spec.timeout_s)

    def start(self) -> None:
        common = (self._spec.payload_bytes, round(self._spec.timeout_s * 1000))
        self._crew.spawn("listening", self._binds, _bind_address(self._transport), *common)
        self._crew.spawn("timing", self._connects, self._crew.hear("listening"), *common)
        self._crew.await_ready()

    def run_once(self) -> float:
        return self._crew.run_once()["timing"]

    def close(self) -> None:
        self._crew.close()


def stream(name: str, spec: Spec, transport: Transport) -> PairContender:
    return PairContender(name, spec, transport, receiver_worker, sender_worker)


def echo(name: str, spec: Spec, transport: Transport) -> PairContender:
    return PairContender(name, spec, transport, answering_worker, asking_worker)


def _bind_address(transport: Transport) -> str:
    match transport:
        case "ipc":
            return f"ipc://@downpour-bench-{uuid.uuid4().hex}"  # Linux's abstract names leave no file behind
        case "tcp":
            return "tcp://127.0.0.1:*"


@contextmanager
def sender_worker(_tell: Tell, address: str, payload_bytes: int, timeout_ms: int) -> Iterator[RunOnce]:
    """Sends the payload as slices of one array, without copying (`copy=False`)."""
    messages = _messages(payload_bytes)
    with _pair_socket(timeout_ms) as socket:
        socket.connect(address)

        def run_once() -> float:
            socket.send(BEGIN)
            if (answer := socket.recv()) != READY:  # the receiver is now waiting for data
                raise ContenderError(f"receiver sent {answer!r} instead of {READY!r}")
            start = time.perf_counter()
            for message in messages:
                socket.send(message, copy=False)
            acknowledged = int(socket.recv())
            took_s = time.perf_counter() - start
            if acknowledged != payload_bytes:
                raise ContenderError(f"{acknowledged} bytes arrived of {payload_bytes}")
            return took_s

        yield run_once


@contextmanager
def receiver_worker(tell: Tell, address: str, payload_bytes: int, timeout_ms: int) -> Iterator[RunOnce]:
    """Takes each message as a frame (`copy=False`), counts its bytes and drops it."""
    with _pair_socket(timeout_ms) as socket:
        socket.bind(address)
        tell(socket.getsockopt_string(zmq.LAST_ENDPOINT))

        def run_once() -> float:
            start = time.perf_counter()
            if (first := socket.recv()) != BEGIN:
                raise ContenderError(f"sender sent {first!r} instead of {BEGIN!r}")
            socket.send(READY)
            arrived = 0
            while arrived < payload_bytes:
                arrived += len(socket.recv(copy=False))
            socket.send(str(arrived).encode())
            return time.perf_counter() - start

        yield run_once


@contextmanager
def asking_worker(_tell: Tell, address: str, payload_bytes: int, timeout_ms: int) -> Iterator[RunOnce]:
    """Queues all messages at once, without copying, and takes the answers as frames."""
    messages = _messages(payload_bytes)
    with _pair_socket(timeout_ms) as socket:
        socket.connect(address)

        def run_once() -> float:
            socket.send(BEGIN)
            if (answer := socket.recv()) != READY:
                raise ContenderError(f"the answering side sent {answer!r} instead of {READY!r}")
            start = time.perf_counter()
            for message in messages:
                socket.send(message, copy=False)
            answered = sum(len(socket.recv(copy=False)) for _ in messages)
            took_s = time.perf_counter() - start
            if answered != payload_bytes:
                raise ContenderError(f"{answered} bytes came back of {payload_bytes}")
            return took_s

        yield run_once


@contextmanager
def answering_worker(tell: Tell, address: str, payload_bytes: int, timeout_ms: int) -> Iterator[RunOnce]:
    """Drops each message and answers with as many bytes of its own, without copying."""
    answers = _messages(payload_bytes)
    with _pair_socket(timeout_ms) as socket:
        socket.bind(address)
        tell(socket.getsockopt_string(zmq.LAST_ENDPOINT))

        def run_once() -> float:
            start = time.perf_counter()
            if (first := socket.recv()) != BEGIN:
                raise ContenderError(f"the asking side sent {first!r} instead of {BEGIN!r}")
            socket.send(READY)
            for answer in answers:
                if (arrived := len(socket.recv(copy=False))) != len(answer):
                    raise ContenderError(f"{arrived} bytes arrived instead of {len(answer)}")
                socket.send(answer, copy=False)
            return time.perf_counter() - start

        yield run_once


def _messages(payload_bytes: int) -> list[memoryview]:
    """The payload as slices of one array."""
    payload = np.ones(payload_bytes, dtype=np.uint8).data
    return [payload[start : start + MESSAGE_BYTES] for start in range(0, payload_bytes, MESSAGE_BYTES)]


@contextmanager
def _pair_socket(timeout_ms: int) -> Iterator[zmq.Socket[bytes]]:
    """A PAIR socket with libzmq's defaults, except that no wait is endless."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
        socket.setsockopt(zmq.SNDTIMEO, timeout_ms)
        yield socket
