"""Both sides of a transport in one process, without sockets: for tests and simulators.

Messages pass through :mod:`downpour_common.wire` as they do on a network, with payloads copied.
"""

from __future__ import annotations

import itertools
import queue
from dataclasses import dataclass

from downpour_common import wire
from downpour_common.messages import Message
from downpour_common.transport import Peer, Sent


@dataclass(frozen=True, slots=True)
class _Copied:
    done: bool = True


class MemoryNetwork:
    """Servers by address."""

    def __init__(self) -> None:
        self._servers: dict[str, MemoryServer] = {}
        self._clients = itertools.count()

    def server(self, address: str) -> MemoryServer:
        """A server at ``address``."""
        server = MemoryServer(address)
        self._servers[address] = server
        return server

    def client(self) -> MemoryClient:
        """A client that can reach every server of this network."""
        return MemoryClient(self, b"client-%d" % next(self._clients))

    def find(self, address: str) -> MemoryServer | None:
        """The server at ``address``, if it is there."""
        return self._servers.get(address)


class MemoryServer:
    """See :class:`downpour_common.transport.ServerTransport`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.malformed = 0
        self.inbox: queue.SimpleQueue[tuple[Peer, list[wire.Frame]] | None] = queue.SimpleQueue()
        self.peers: dict[Peer, MemoryClient] = {}
        self.closed = False

    def poll(self, timeout_s: float) -> list[tuple[Peer, Message]]:
        """See the interface."""
        try:
            item = self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if item is None:
            return []
        return [(item[0], wire.decode(item[1], wire.CONTROL_HEADER_LIMIT))]

    def send(self, peer: Peer, message: Message) -> Sent:
        """See the interface."""
        client = self.peers.get(peer)
        if client is not None:
            client.inbox.put((self.address, _frozen(message)))
        return _Copied()

    def wake(self) -> None:
        """Make a :meth:`poll` under way in another thread return."""
        self.inbox.put(None)

    def close(self) -> None:
        """See the interface."""
        self.closed = True


class MemoryClient:
    """See :class:`downpour_common.transport.ClientTransport`."""

    def __init__(self, network: MemoryNetwork, name: Peer) -> None:
        self._network = network
        self._name = name
        self.malformed = 0
        self.inbox: queue.SimpleQueue[tuple[str, list[wire.Frame]] | None] = queue.SimpleQueue()

    def send(self, server: str, message: Message) -> None:
        """See the interface; a message to a server that is not there or closed is lost."""
        target = self._network.find(server)
        if target is not None and not target.closed:
            target.peers[self._name] = self
            target.inbox.put((self._name, _frozen(message)))

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        """See the interface."""
        try:
            item = self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if item is None:
            return []
        return [(item[0], wire.decode(item[1], wire.CONTROL_HEADER_LIMIT))]

    def forget(self, server: str) -> None:
        """See the interface; nothing is kept of a server."""

    def wake(self) -> None:
        """See the interface."""
        self.inbox.put(None)

    def close(self) -> None:
        """See the interface."""


def _frozen(message: Message) -> list[wire.Frame]:
    return [bytearray(frame) for frame in wire.encode(message)]
