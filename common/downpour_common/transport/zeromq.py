"""ZeroMQ: ROUTER at the server, one DEALER per server at the client. The only module that imports zmq."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import zmq

from downpour_common import wire
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.messages import Message
from downpour_common.transport import Peer, Sent

ZERO_COPY_BYTES = 64 << 10
"""Payloads from this size on are sent from their own memory; below, a copy is cheaper than its bookkeeping."""
MAX_FRAME_BYTES = 72 << 20
"""Larger frames close the connection that sent them (the largest chunk is 64 MiB, a control header 64 MiB)."""
DRAIN = 64
"""Messages taken from a socket before the caller sees them."""
CLOSE_LINGER_MS = 500


def _configure(sock: zmq.Socket[bytes]) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, 100_000)
    sock.setsockopt(zmq.RCVHWM, 100_000)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
    sock.setsockopt(zmq.RECONNECT_IVL, 20)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
    sock.setsockopt(zmq.SNDBUF, 4 << 20)
    sock.setsockopt(zmq.RCVBUF, 4 << 20)


@dataclass(frozen=True, slots=True)
class _Done:
    done: bool = True


_DONE = _Done()


class ZmqServer:
    """A bound ROUTER. ``endpoint``: ``ipc://PATH`` or ``tcp://HOST:PORT`` (port 0: a free one).

    Raises :class:`ConfigError` when the endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, header_limit: int = wire.DATA_HEADER_LIMIT) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._header_limit = header_limit
        self.malformed = 0
        _configure(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, 4096)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            hint = "; choose another port, or 0 for a free one" if error.errno == zmq.EADDRINUSE else ""
            raise ConfigError(f"cannot listen on {endpoint}: {error.strerror}{hint}") from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def fileno(self) -> int:
        """A descriptor that becomes readable when :meth:`poll` may have something (edge-triggered)."""
        return int(self._socket.getsockopt(zmq.FD))

    def poll(self, timeout_s: float) -> list[tuple[Peer, Message]]:
        """See :class:`downpour_common.transport.ServerTransport`."""
        arrived: list[tuple[Peer, Message]] = []
        if not self._socket.poll(int(timeout_s * 1000)):
            return arrived
        while len(arrived) < DRAIN:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            try:
                arrived.append((frames[0].bytes, _decode(frames[1:], self._header_limit)))
            except ProtocolError:
                self.malformed += 1
        return arrived

    def send(self, peer: Peer, message: Message) -> Sent:
        """See :class:`downpour_common.transport.ServerTransport`."""
        try:
            return _send(self._socket, [peer, *wire.encode(message)])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return _DONE
            raise

    def close(self) -> None:
        """See :class:`downpour_common.transport.ServerTransport`."""
        self._socket.close(linger=CLOSE_LINGER_MS)
        self._context.term()


class ZmqClient:
    """DEALERs by server address, opened at the first message, and a pipe to be woken through."""

    def __init__(self, header_limit: int = wire.DATA_HEADER_LIMIT) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[Any, str] = {}
        self._poller = zmq.Poller()
        self._header_limit = header_limit
        self._asleep, self._waker = socket.socketpair()
        self._asleep.setblocking(False)
        self._waker.setblocking(False)
        self._poller.register(self._asleep, zmq.POLLIN)
        self.malformed = 0

    def send(self, server: str, message: Message) -> None:
        """See :class:`downpour_common.transport.ClientTransport`."""
        sock = self._sockets.get(server)
        if sock is None:
            sock = self._context.socket(zmq.DEALER)
            _configure(sock)
            sock.connect(server)
            self._sockets[server] = sock
            self._addresses[sock] = server
            self._poller.register(sock, zmq.POLLIN)
        _send(sock, wire.encode(message))

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        """See :class:`downpour_common.transport.ClientTransport`."""
        arrived: list[tuple[str, Message]] = []
        for sock, _ in self._poller.poll(int(timeout_s * 1000)):
            if sock == self._asleep.fileno():
                _swallow(self._asleep)
                continue
            address = self._addresses[sock]
            for _ in range(DRAIN):
                try:
                    frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                try:
                    arrived.append((address, _decode(frames, self._header_limit)))
                except ProtocolError:
                    self.malformed += 1
        return arrived

    def wake(self) -> None:
        """See :class:`downpour_common.transport.ClientTransport`."""
        try:
            self._waker.send(b"w")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already
        except OSError:
            pass  # closed: nobody is left to wake

    def close(self) -> None:
        """See :class:`downpour_common.transport.ClientTransport`."""
        for sock in self._sockets.values():
            sock.close(linger=CLOSE_LINGER_MS)
        self._context.term()
        self._asleep.close()
        self._waker.close()


def _send(sock: zmq.Socket[bytes], frames: list[wire.Frame]) -> Sent:
    *heads, last = frames
    for head in heads:
        sock.send(head, zmq.SNDMORE | zmq.NOBLOCK)
    if memoryview(last).nbytes < ZERO_COPY_BYTES:
        sock.send(last, zmq.NOBLOCK)
        return _DONE
    tracker = sock.send(last, zmq.NOBLOCK, copy=False, track=True)
    assert tracker is not None
    return tracker


def _decode(frames: list[zmq.Frame], header_limit: int) -> Message:
    if not frames:
        raise ProtocolError("empty message")
    return wire.decode([frames[0].bytes, *[f.buffer for f in frames[1:]]], header_limit)


def _swallow(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return
