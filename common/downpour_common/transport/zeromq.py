"""ZeroMQ: ROUTER at the server, one DEALER per server at the client. The only module that imports zmq.

With keys, every connection is CURVE: both sides prove their keys, everything is encrypted, and the server asks its own
list who may come in (ZAP, https://rfc.zeromq.org/spec/27). Without the list libzmq would let any key in.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import zmq
from zmq.backend.cython import _zmq
from zmq.utils import z85

from downpour_common import wire
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.keys import ClientKeys, KeyPair, ServerKeys
from downpour_common.messages import Message
from downpour_common.transport import Peer, Sent
from downpour_common.transport.libzmq import Lends, Library, Line, Waiting

ZERO_COPY_BYTES = 64 << 10
"""Payloads from this size on are sent from their own memory; below, a copy is cheaper than its bookkeeping."""
MAX_FRAME_BYTES = 72 << 20
"""Larger frames close the connection that sent them (the largest chunk is 64 MiB, a control header 64 MiB)."""
BACKLOG = 100_000
"""Messages that wait for a peer before more are dropped."""
DRAIN = 64
"""Messages taken from a socket before the caller sees them."""
SKIP = 4096
"""Messages dropped in one poll before the caller gets its turn again."""
CLOSE_LINGER_MS = 500
MEND_S, MEND_MAX_S = 0.05, 1.0
"""Shortest and longest time between two connections to a server that refuses."""

Trouble = Literal["", "refused", "unreachable", "wrong-server-key"]

_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"downpour"


def new_key_pair() -> KeyPair:
    """A fresh key pair, from the system's randomness."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def public_of(secret: str) -> str:
    """The public half that belongs to a secret one, both in Z85."""
    return zmq.curve_public(secret.encode("ascii")).decode("ascii")


def _configure(sock: zmq.Socket[bytes], backlog: int = BACKLOG) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, backlog)
    sock.setsockopt(zmq.RCVHWM, 100_000)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
    sock.setsockopt(zmq.RECONNECT_IVL, 20)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)


@dataclass(frozen=True, slots=True)
class _Done:
    done: bool = True


_DONE = _Done()


class _Doorman:
    """Answers libzmq's question, once per connection and before any message of it is seen, whether a key may come in.

    It has a thread of its own, because the one that owns the server may be busy, and because a descriptor for an event
    loop can stand for one socket only. What it tells libzmq as the user's id is the key: the user's name is looked up
    per message, so that a key withdrawn since is noticed.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Mapping[str, str]) -> None:
        self._allowed = allowed
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP)
        self._thread = threading.Thread(target=self._run, name="downpour-zap", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                request = self._socket.recv_multipart()
                self._socket.send_multipart(_zap_reply(request, self._allowed))
            except zmq.ContextTerminated:
                break
        self._socket.close()

    def join(self) -> None:
        """Wait for the thread, which ends with the context."""
        self._thread.join()


def _zap_reply(request: list[bytes], allowed: Mapping[str, str]) -> list[bytes]:
    """``request``: version, number, domain, address, routing id, mechanism, key. The reply: version, number, status,
    text, user, metadata. Whatever is not exactly as expected is refused."""
    match request:
        case [b"1.0", number, domain, _, _, b"CURVE", key] if domain == _DOMAIN and len(key) == 32:
            text = z85.encode(key)
            if text.decode("ascii") in allowed:
                return [b"1.0", number, b"200", b"OK", text, b""]
    return [b"1.0", request[1] if len(request) > 1 else b"", b"400", b"not authorized", b"", b""]


def _allow_ipv6(sock: zmq.Socket[bytes], endpoint: str) -> None:
    """Only where it is asked for: with it, names that have both kinds of address may resolve to the wrong one."""
    if "[" in endpoint:
        sock.setsockopt(zmq.IPV6, 1)


class ZmqServer:
    """A bound ROUTER. ``endpoint``: ``ipc://PATH`` or ``tcp://HOST:PORT`` (port 0: a free one).

    With ``keys``, only clients whose key is in ``keys.allowed`` are let in. ``refused`` counts messages dropped because
    the key of their connection has been taken out since. ``backlog``: answers that wait for a peer which does not read,
    before more are dropped; its memory is what they take.

    Raises :class:`ConfigError` when the endpoint cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        header_limit: int = wire.DATA_HEADER_LIMIT,
        keys: ServerKeys | None = None,
        backlog: int = BACKLOG,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        _seed_routing_ids()
        self._socket = self._context.socket(zmq.ROUTER)
        self._lends = Lends()
        self._line = Line(_library(), self._socket.underlying, self._lends)
        self._waiting = Waiting([self._line.handle])
        self._header_limit = header_limit
        self._allowed = None if keys is None else keys.allowed
        self._doorman: _Doorman | None = None
        self.malformed = 0
        self.refused = 0
        _configure(self._socket, backlog)
        _allow_ipv6(self._socket, endpoint)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, 4096)
        if keys is not None:
            self._doorman = _Doorman(self._context, keys.allowed)  # before anyone can connect
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret.encode("ascii"))
            self._socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            hint = "; choose another port, or 0 for a free one" if error.errno == zmq.EADDRINUSE else ""
            raise ConfigError(f"cannot listen on {endpoint}: {error.strerror}{hint}") from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def fileno(self) -> int:
        """A descriptor that becomes readable when :meth:`poll` may have something (edge-triggered).

        Poll until nothing comes, and again after each :meth:`send` made outside of that: a send may take the edge.
        """
        return int(self._socket.getsockopt(zmq.FD))

    def poll(self, timeout_s: float) -> list[tuple[Peer, Message]]:
        """See :class:`downpour_common.transport.ServerTransport`."""
        return [(peer, message) for peer, _, message in self.poll_users(timeout_s)]

    def poll_users(self, timeout_s: float) -> list[tuple[Peer, str, Message]]:
        """Like :meth:`poll`, with the user that ``keys.allowed`` names for the key of each message's own connection.

        The user comes from the connection, never from the routing id, which a client chooses freely. Without keys it
        is "". An empty list means that nothing is waiting, unless thousands of messages in a row were dropped.
        """
        self._lends.release()
        arrived = self._take()
        if not arrived and (timeout_ms := int(timeout_s * 1000)) and _library().wait(self._waiting, timeout_ms):
            arrived = self._take()
        return arrived

    def _take(self) -> list[tuple[Peer, str, Message]]:
        """What waits, without waiting for more."""
        arrived: list[tuple[Peer, str, Message]] = []
        dropped = 0
        while len(arrived) < DRAIN and dropped < SKIP and (found := self._line.receive(2)) is not None:
            (peer, *frames), user = found
            if self._allowed is not None:
                known = self._allowed.get(user)
                if known is None:
                    self.refused += 1
                    dropped += 1
                    continue
                user = known
            try:
                arrived.append((bytes(peer), user, wire.decode(frames, self._header_limit)))
            except ProtocolError:
                self.malformed += 1
                dropped += 1
        return arrived

    def send(self, peer: Peer, message: Message) -> Sent:
        """See :class:`downpour_common.transport.ServerTransport`."""
        try:
            return self._line.send([peer, *wire.encode(message)], ZERO_COPY_BYTES) or _DONE
        except OSError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return _DONE
            raise

    def close(self) -> None:
        """See :class:`downpour_common.transport.ServerTransport`."""
        self._line.close()
        self._socket.close(linger=CLOSE_LINGER_MS)
        self._context.term()
        self._lends.clear()
        if self._doorman is not None:
            self._doorman.join()


class ZmqClient:
    """DEALERs by server address, opened at the first message, and a pipe to be woken through.

    With ``keys``, a server must prove to have the key that they name for its address. ``watch``: observe connections,
    for :meth:`trouble`.

    libzmq connects again by itself when a connection breaks, but not when the server turned this client's key down or
    speaks another mechanism; such a connection is made anew here, and what was sent through it before is lost.
    """

    def __init__(
        self, header_limit: int = wire.DATA_HEADER_LIMIT, keys: ClientKeys | None = None, watch: bool = False
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._lines: dict[str, Line] = {}
        self._lends = Lends()
        self._waiting: Waiting | None = None
        self._looked_s = 0.0
        self._header_limit = header_limit
        self._keys = keys
        self._watches: dict[str, _Watch] | None = {} if watch else None
        self._mended: dict[str, tuple[float, float]] = {}  # when the connection may be made anew, then the next pause
        self._asleep, self._waker = socket.socketpair()
        self._asleep.setblocking(False)
        self._waker.setblocking(False)
        self.malformed = 0

    def send(self, server: str, message: Message) -> None:
        """See :class:`downpour_common.transport.ClientTransport`."""
        line = self._lines.get(server) or self._connect(server)
        try:
            line.send(wire.encode(message), ZERO_COPY_BYTES)
        except BlockingIOError:
            self._mend(server)  # the message is lost, as others on this connection were

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        """See :class:`downpour_common.transport.ClientTransport`."""
        self._lends.release()
        arrived: list[tuple[str, Message]] = []
        for server in self._lines:
            self._take(server, arrived)
        if not arrived:
            for server in self._wait(int(timeout_s * 1000)):
                self._take(server, arrived)
        if not arrived:
            self._look()
        return arrived

    def _take(self, server: str, arrived: list[tuple[str, Message]]) -> None:
        """What has come from this server, without waiting for more."""
        line = self._lines[server]
        for _ in range(DRAIN):
            found = line.receive(1)
            if found is None:
                return
            if self._mended:
                self._mended.pop(server, None)  # it answers: the next trouble is a new one
            try:
                arrived.append((server, wire.decode(found[0], self._header_limit)))
            except ProtocolError:
                self.malformed += 1

    def _wait(self, timeout_ms: int) -> list[str]:
        """Until something comes or somebody wakes; the servers that it has come from."""
        if not timeout_ms:
            return []
        if self._waiting is None:
            self._waiting = Waiting([line.handle for line in self._lines.values()], self._asleep.fileno())
        found = _library().wait(self._waiting, timeout_ms)
        if found and found[-1] == len(self._lines):
            found.pop()
            _swallow(self._asleep)
        servers = list(self._lines)
        return [servers[place] for place in found]

    def _look(self) -> None:
        """Mend the connections that have ended for good."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= MEND_S:
            self._looked_s = now_s
            for server in [s for s, sock in self._sockets.items() if not _writable(sock)]:
                self._mend(server)

    def trouble(self, server: str) -> Trouble:
        """Why the server at this address does not answer, as far as it can be told; "" while nothing is known.

        - ``refused``: it does not accept our key, or wants one and we have none;
        - ``unreachable``: nobody listens there, or nobody who speaks this protocol;
        - ``wrong-server-key``: somebody listens who cannot prove to have the key expected there.

        It is what the last attempt to connect came to, and none of it is proven: who sits in between can feign each.
        """
        assert self._watches is not None, "this client was made without watch=True"
        watch = self._watches.get(server)
        return "" if watch is None else watch.look(self._keys is not None)

    def _connect(self, server: str) -> Line:
        sock = self._context.socket(zmq.DEALER)
        _configure(sock)
        _allow_ipv6(sock, server)
        if self._keys is not None:
            sock.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.pair.public.encode("ascii"))
            sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.pair.secret.encode("ascii"))
            sock.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server_at(server).encode("ascii"))
        if self._watches is not None:
            self._watches.setdefault(server, _Watch()).begin(sock)
        sock.connect(server)
        self._sockets[server] = sock
        self._lines[server] = line = Line(_library(), sock.underlying, self._lends)
        self._waiting = None
        return line

    def _mend(self, server: str) -> None:
        """Connect anew, now and then: this connection has ended for good, or has as much queued as it can hold."""
        now_s = time.monotonic()
        not_before_s, pause_s = self._mended.get(server, (0.0, MEND_S))
        if now_s < not_before_s:
            return
        self._mended[server] = now_s + pause_s, min(2 * pause_s, MEND_MAX_S)
        self._disconnect(server, 0)
        self._connect(server)

    def forget(self, server: str) -> None:
        """See :class:`downpour_common.transport.ClientTransport`."""
        if server in self._sockets:
            self._disconnect(server, 0)
        self._mended.pop(server, None)

    def _disconnect(self, server: str, linger_ms: int) -> None:
        sock = self._sockets.pop(server)
        self._lines.pop(server).close()
        self._waiting = None
        if self._watches is not None:
            self._watches[server].end(sock, self._keys is not None)
        sock.close(linger=linger_ms)

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
        for server in list(self._sockets):
            self._disconnect(server, CLOSE_LINGER_MS)
        self._context.term()
        self._lends.clear()
        self._asleep.close()
        self._waker.close()


class _Watch:
    """What libzmq reports of the connections to one address, one socket after another."""

    def __init__(self) -> None:
        self._monitor: zmq.Socket[bytes] | None = None
        self._reached = False
        self._trouble: Trouble = ""

    def begin(self, sock: zmq.Socket[bytes]) -> None:
        """Observe this socket from now on."""
        self._monitor = sock.get_monitor_socket()

    def end(self, sock: zmq.Socket[bytes], with_keys: bool) -> None:
        """Observe it no longer."""
        self.look(with_keys)
        sock.disable_monitor()
        if self._monitor is not None:
            self._monitor.close(linger=0)
            self._monitor = None

    def look(self, with_keys: bool) -> Trouble:
        """Take in what has happened; what the last attempt came to."""
        while self._monitor is not None:
            try:
                event, value = struct.unpack("=HI", self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                break
            self._take(event, value, with_keys)
        return self._trouble

    def _take(self, event: int, value: int, with_keys: bool) -> None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._trouble = ""
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._trouble = "refused"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._trouble = "wrong-server-key" if with_keys else "refused"
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if value in (errno.EPIPE, errno.ECONNRESET):
                # It hung up during the handshake, as a server does that cannot read what was encrypted for another.
                self._trouble = "wrong-server-key" if with_keys else "refused"
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_CLOSED:
                self._trouble = "unreachable"
            case zmq.EVENT_CONNECTED:
                self._reached = True
            case zmq.EVENT_CONNECT_RETRIED:
                if not self._reached:  # a name that cannot be resolved closes nothing
                    self._trouble = "unreachable"
                self._reached = False
            case _:
                pass


@functools.cache
def _library() -> Library:
    return Library(_zmq.__file__)


def _seed_routing_ids() -> None:
    """Have the next ROUTER begin to count its clients at a number that nobody knows.

    libzmq 4.3.5 gives clients without a routing id of their own 0 and a counter of 32 bits, does not stop others from
    calling themselves just that, and aborts the process when the two meet. The counter begins with the C library's
    ``rand()``, which nobody seeds, so that it is the same in every process.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "srand"):
        libc.srand(secrets.randbits(32))


def _writable(sock: zmq.Socket[bytes]) -> bool:
    """Whether a message could be queued. On a DEALER: whether it has a connection, be it one still to come about."""
    return bool(int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)


def _swallow(sock: socket.socket) -> None:
    """What it leaves only wakes once more."""
    try:
        sock.recv(4096)
    except BlockingIOError:
        return
