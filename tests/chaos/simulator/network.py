"""A network of messages: what ZeroMQ promises, and no more.

Between one client and one server messages arrive in the order sent, whole, each after a delay of its own. Between
different pairs there is no order. On links to the coordinator messages are lost, too, and what was under way to or
from a process that dies may be lost or not. Copies of contributions and of requests to the coordinator arrive
once more, later, as if a sender had repeated them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from downpour_common import messages as m
from downpour_common.messages import Message
from simulator.kernel import Hub, Task

COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Weather:
    """``usual_s``: a message's delay is up to twice that; ``rare``: the share of those that take ``long_s`` more.
    ``loss``, ``copies``: shares of messages that are lost (coordinator only), or arrive twice."""

    usual_s: float
    rare: float
    long_s: float
    loss: float
    copies: float


@dataclass(frozen=True)
class Copied:
    """The token of a message that was copied when it was sent."""

    done: bool = True


SENT = Copied()


class Link:
    """One direction of one connection."""

    __slots__ = ("cut_s", "free_s", "state")

    def __init__(self, seed: int) -> None:
        self.free_s = 0.0
        self.cut_s = float("inf")
        """nothing comes after this"""
        self.state = seed

    def draw(self) -> float:
        """The next number in [0, 1) of this link's own sequence."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        return (self.state >> 11) / 9007199254740992.0


class Network:
    """``trace`` is told of each message as it arrives or is lost."""

    def __init__(self, hub: Hub, seed: int, weather: Weather, trace: Callable[[str], None] | None) -> None:
        self.hub = hub
        self.weather = weather
        self.arrivals = 0
        self.on_arrival: Callable[[], None] = lambda: None
        self._trace = trace
        self._random = Random(seed)
        self._servers: dict[str, Server] = {}
        self._clients: dict[bytes, Client] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._cut_s: dict[str, float] = {}

    def serve(self, server: Server) -> None:
        """Whoever sends to its address reaches it from now on."""
        self._servers[server.address] = server

    def join(self, client: Client) -> None:
        """It can be answered from now on."""
        self._clients[client.peer] = client

    def cut(self, name: str, until_s: float) -> None:
        """Between this process and the coordinator everything is lost for a while."""
        self._cut_s[name] = until_s

    def died(self, names: tuple[str, ...]) -> None:
        """Of what these endpoints had under way, on each connection a first part still arrives."""
        for (source, _), link in self._links.items():
            if source in names and link.free_s > self.hub.now_s:
                link.cut_s = self.hub.now_s + (link.free_s - self.hub.now_s) * 1.5 * link.draw()

    def to_server(self, client: Client, address: str, message: Message) -> None:
        """A client sends."""
        self._send(client.name, address, message, lambda sent: self._at_server(client, address, sent))

    def to_client(self, address: str, server: Server, peer: bytes, message: Message) -> None:
        """A server sends; to a peer that is gone, nothing."""
        client = self._clients.get(peer)
        if client is not None:
            self._send(address, client.name, message, lambda sent: self._at_client(server, client, sent))

    def _send(self, source: str, target: str, message: Message, arrive: Callable[[Message], None]) -> None:
        link = self._links.get((source, target))
        if link is None:
            link = self._links[source, target] = Link(self._random.getrandbits(63))
        weather, hub = self.weather, self.hub
        controlled = COORDINATOR in (source, target)
        sent = _copied(message)
        if controlled:
            other = source if target == COORDINATOR else target
            if link.draw() < weather.loss or self._cut_s.get(other, 0.0) > hub.now_s:
                if self._trace:
                    self._trace(f"{source} -> {target} LOST {describe(message)}")
                return
        delay_s = weather.usual_s * 2 * link.draw()
        if link.draw() < weather.rare:
            delay_s += weather.long_s * link.draw()
        link.free_s = max(link.free_s, hub.now_s + delay_s)
        hub.at(link.free_s, lambda: self._arrive(link, source, target, sent, arrive))
        repeatable = isinstance(message, m.Contribution) or (target == COORDINATOR and isinstance(message, m.Request))
        if repeatable and link.draw() < weather.copies:
            again = _copied(message)
            hub.at(
                link.free_s + weather.long_s * link.draw(), lambda: self._arrive(link, source, target, again, arrive)
            )

    def _arrive(
        self, link: Link, source: str, target: str, message: Message, arrive: Callable[[Message], None]
    ) -> None:
        if self.hub.now_s > link.cut_s:
            return
        if self._trace:
            self._trace(f"{source} -> {target} {describe(message)}")
        self.arrivals += 1
        arrive(message)
        self.on_arrival()

    def _at_server(self, client: Client, address: str, message: Message) -> None:
        server = self._servers.get(address)
        if server is not None:
            server.arrived(client.peer, message)

    @staticmethod
    def _at_client(server: Server, client: Client, message: Message) -> None:
        client.arrived(server.address, message)


class Server:
    """The answering side; see :class:`downpour_common.transport.ServerTransport`. ``task``: who polls."""

    def __init__(self, network: Network, address: str, task: Task | None = None) -> None:
        self.address = address
        self.malformed = 0
        self.task = task
        self.open = True
        self.inbox: list[tuple[bytes, Message]] = []
        self._network = network
        network.serve(self)

    def arrived(self, peer: bytes, message: Message) -> None:
        """The network brings a message."""
        if self.open:
            self.inbox.append((peer, message))
            if self.task is not None:
                self.task.wake()

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        """See the interface; also ends when another transport of the same process has something."""
        if not self.inbox and timeout_s > 0:
            assert self.task is not None
            self.task.sleep(self._network.hub.now_s + timeout_s)
        arrived, self.inbox = self.inbox, []
        return arrived

    def send(self, peer: bytes, message: Message) -> Copied:
        """See the interface."""
        if self.open:
            self._network.to_client(self.address, self, peer, message)
        return SENT

    def close(self) -> None:
        """See the interface."""
        self.open = False


class Client:
    """The asking side; see :class:`downpour_common.transport.ClientTransport`."""

    def __init__(self, network: Network, name: str, task: Task, on_idle: Callable[[], None] | None = None) -> None:
        self.name = name
        self.peer = name.encode()
        self.malformed = 0
        self.open = True
        self.inbox: list[tuple[str, Message]] = []
        self.on_send: Callable[[Message], None] = lambda _: None
        self.attended = False
        """whether somebody polls"""
        self._task = task
        self._network = network
        self._on_idle = on_idle
        network.join(self)

    def arrived(self, address: str, message: Message) -> None:
        """The network brings a message."""
        if not self.open:
            return
        self.inbox.append((address, message))
        if self.attended or self._on_idle is None:
            self._task.wake()
        else:
            self._on_idle()

    def send(self, server: str, message: Message) -> None:
        """See the interface."""
        if self.open:
            self.on_send(message)
            self._network.to_server(self, server, message)

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        """See the interface."""
        if not self.inbox and timeout_s > 0:
            self.attended = True
            try:
                self._task.sleep(self._network.hub.now_s + timeout_s)
            finally:
                self.attended = False
        arrived, self.inbox = self.inbox, []
        return arrived

    def forget(self, server: str) -> None:
        """See the interface: what has not left may still arrive, or not."""
        self.inbox = [(address, message) for address, message in self.inbox if address != server]

    def wake(self) -> None:
        """See the interface; there is one thread only."""

    def close(self) -> None:
        """See the interface."""
        self.open = False


def _copied(message: Message) -> Message:
    """As on a network: what the sender does to a payload afterwards does not show."""
    payload = getattr(message, "payload", None)
    return message if payload is None else replace(message, payload=bytearray(payload))  # type: ignore[call-arg]


def describe(message: Message) -> str:
    """One line for the event log."""
    name = type(message).__name__
    shown = []
    for key in message.__dataclass_fields__:
        value = getattr(message, key)
        if key in ("payload", "model", "hyper", "job", "digest") or (isinstance(value, dict) and len(value) > 4):
            continue
        shown.append(f"{key}={value!r}")
    return f"{name}({', '.join(shown)})"
