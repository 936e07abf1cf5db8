"""Gathers facts in a conversation with the coordinator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import repeat

from downpour.jobs.access import Access
from downpour.jobs.client import ClusterClient, WatchedTransport
from downpour.jobs.errors import ClusterError, CoordinatorUnreachable, Forbidden
from downpour_common import wire
from downpour_common.errors import ProtocolError
from downpour_common.keys import ClientKeys
from downpour_common.messages import Ping, Pong
from downpour_common.transport.zeromq import ZmqClient
from downpour_deploy.doctor.facts import ClusterFacts, Throughput

PINGS = 20
PAYLOAD_BYTES, SMALL_BYTES = 1 << 20, 64 << 10
FAST_S = 0.1
"""A small payload that takes longer than this to come back is not followed by large ones."""
MOST_BYTES = 64 << 20
MOST_S = 3.0

Connect = Callable[[Access], WatchedTransport]


class _TimeUp(Exception):
    """Measuring has taken long enough."""


def look(
    address: str,
    keys: ClientKeys | None,
    may_list: bool,
    timeout_s: float,
    *,
    connect: Connect | None = None,
    now: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> ClusterFacts:
    """Ask the coordinator at ``address`` (``tcp://HOST:PORT``) who it is, and measure the way to it.

    ``may_list``: the key is a user's, so that nodes may be asked for. ``timeout_s``: silence that ends it.
    """
    made: list[WatchedTransport] = []

    def remembered(where: Access) -> WatchedTransport:
        transport = connect(where) if connect is not None else ZmqClient(wire.CONTROL_HEADER_LIMIT, keys, watch=True)
        made.append(transport)
        return transport

    # The keys are those that were looked at already, whatever their role is; the client is told of none.
    with ClusterClient(address, None, "none", timeout_s, connect=remembered, now=now) as client:
        try:
            facts, trips_s, ahead_s, error_s = _ping(client, wall)
        except Forbidden:
            return ClusterFacts(made[-1].trouble(address) or "forbidden")
        except CoordinatorUnreachable:
            return ClusterFacts("silent" if made[-1].trouble(address) != "unreachable" else "unreachable")
        except (ClusterError, ProtocolError):
            return ClusterFacts("silent")
        nodes, measured = None, None
        try:
            if may_list:
                nodes = tuple(client.nodes().get("nodes", ()))
            measured = _throughput(client)
        except (ClusterError, ProtocolError):
            pass  # it has gone meanwhile, or does not allow that: what is known already stands
    return ClusterFacts("answered", facts, trips_s, ahead_s, error_s, measured, nodes)


def _ping(
    client: ClusterClient, wall: Callable[[], float]
) -> tuple[dict[str, object], tuple[float, ...], float, float]:
    """The coordinator's facts, round trips, by how much its clock is ahead, by how much that may be wrong."""
    facts: dict[str, object] = {}
    trips_s: list[float] = []
    best_s, ahead_s = float("inf"), 0.0
    for count in range(PINGS + 1):
        sent_s, wall_s = client.now(), wall()
        facts = client.ask(Pong, Ping, b"").document
        trip_s = client.now() - sent_s
        if count:  # the first has made the connection
            trips_s.append(trip_s)
        there_s = facts.get("time_s")
        if isinstance(there_s, (int, float)) and trip_s < best_s:
            # It was read at some time in between: the shorter the trip, the more exactly that is known.
            best_s, ahead_s = trip_s, there_s - (wall_s + trip_s / 2)
    return facts, tuple(trips_s), ahead_s, best_s / 2 if best_s < float("inf") else 0.0


def _throughput(client: ClusterClient) -> Throughput:
    """Send payloads that come back, several under way; until :data:`MOST_BYTES` or :data:`MOST_S`."""
    started_s = client.now()
    client.on_silence = lambda _: _stop_after(client.now() - started_s)
    nbytes, took_s = 0, 0.0
    try:
        client.ask(Pong, Ping, bytes(SMALL_BYTES))
        payload = bytes(PAYLOAD_BYTES if client.now() - started_s < FAST_S else SMALL_BYTES)
        began_s = client.now()
        try:
            for pong in client.ask_all(Pong, _pings(payload)):
                nbytes += len(pong.payload)
                took_s = client.now() - began_s
                _stop_after(client.now() - started_s)
        except _TimeUp:
            took_s = client.now() - began_s
    except _TimeUp:
        took_s = client.now() - started_s
    finally:
        client.on_silence = None
    return Throughput(nbytes, max(took_s, 1e-9))


def _pings(payload: bytes) -> Iterator[tuple[type[Ping], bytes]]:
    return repeat((Ping, payload), MOST_BYTES // len(payload))


def _stop_after(elapsed_s: float) -> None:
    if elapsed_s > MOST_S:
        raise _TimeUp
