"""Verdicts about a coordinator that has answered, and its nodes."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from downpour_common.sizes import format_bytes
from downpour_deploy.doctor.facts import ClusterFacts, Throughput
from downpour_deploy.doctor.verdict import Verdict, failed, passed, warned

CLOCK_S = 2.0
"""Wall clocks further apart than this make logs and ages misleading."""
ROUND_TRIP_S = 0.02
SLOW_BYTES_PER_S = 10e6
"""Below, a model of 100 MB takes more than ten seconds each way."""
_SHOWN = 4


def all_of(cluster: ClusterFacts, role: str, own_version: str) -> list[Verdict]:
    """Every verdict."""
    verdicts = [version(cluster, role, own_version), clock(cluster)]
    if cluster.round_trips_s:
        verdicts.append(round_trip(cluster.round_trips_s, role))
    if cluster.throughput is not None:
        verdicts.append(throughput(cluster.throughput, role))
    if cluster.nodes is not None:
        verdicts.append(nodes(cluster.nodes, str(cluster.facts.get("version", ""))))
    return verdicts


def version(cluster: ClusterFacts, role: str, own: str) -> Verdict:
    """Whether both sides are of one version. Processes of a job must be; users may be a little behind."""
    there = str(cluster.facts.get("version", "")) or "unknown"
    if there == own:
        return passed("version", f"{own} here and at the coordinator")
    detail = f"{own} here, {there} at the coordinator"
    action = f"install downpour-ps {there} here" if there != "unknown" else "install the same version on both hosts"
    return warned("version", detail, action) if role == "user" else failed("version", detail, action)


def clock(cluster: ClusterFacts) -> Verdict:
    """Whether the wall clocks agree."""
    apart_s, error_s = cluster.clock_ahead_s, cluster.clock_error_s
    if abs(apart_s) - error_s <= CLOCK_S:
        return passed("clock", f"within {max(abs(apart_s), error_s):.3f} s of the coordinator's")
    detail = f"this host's clock is {abs(apart_s):.1f} s {'behind' if apart_s > 0 else 'ahead of'} the coordinator's"
    return warned("clock", detail, "let both hosts set their clocks by NTP (timedatectl set-ntp true)")


def round_trip(trips_s: Sequence[float], role: str) -> Verdict:
    """The time that a small question takes. Training waits for it in every step, a user does not."""
    middle_s = median(trips_s)
    detail = f"median {_ms(middle_s)}, longest {_ms(max(trips_s))} of {len(trips_s)}"
    if middle_s <= ROUND_TRIP_S or role == "user":
        return passed("round-trip", detail)
    return warned("round-trip", detail, "put servers and workers into one network: each step waits this long or longer")


def throughput(measured: Throughput, role: str) -> Verdict:
    """How fast bytes travel, both ways at once."""
    if not measured.nbytes:
        detail = f"nothing came back within {measured.seconds:.1f} s"
        return warned("throughput", detail, "look for loss on the network (ping, mtr) and for a wrong MTU")
    rate = measured.nbytes / measured.seconds
    detail = f"{rate / 1e6:.0f} MB/s each way ({format_bytes(measured.nbytes)} in {measured.seconds:.1f} s)"
    if rate >= SLOW_BYTES_PER_S or role == "user":
        return passed("throughput", detail)
    action = f"use a faster network: at this rate 100 MB of gradients take {100e6 / rate:.0f} s"
    return warned("throughput", detail, action)


def nodes(found: Sequence[dict[str, Any]], there: str) -> Verdict:
    """Whether the registered hosts are well. ``there``: the coordinator's version."""
    if not found:
        action = "start `downpour server start` and `downpour worker start` on the hosts that are to train"
        return warned("nodes", "no host has joined the coordinator yet", action)
    present = [node for node in found if node.get("state") != "LOST"]
    if lost := [node for node in found if node.get("state") == "LOST"]:
        detail = f"{len(lost)} of {len(found)} hosts do not answer: {_names(lost)}"
        return warned("nodes", detail, "look at the agents on those hosts: is the host up, does the agent run?")
    if other := [node for node in present if node.get("version") != there]:
        detail = f"of another version than the coordinator's {there}: " + _names(other)
        return warned("nodes", detail, f"install downpour-ps {there} there and start their agents again")
    if hidden := [node for node in present if _hidden(node, present)]:
        detail = f"servers that other hosts cannot reach, at addresses of the loopback interface: {_names(hidden)}"
        return warned("nodes", detail, "start those servers with --advertise and an address that others reach")
    roles = [str(node.get("role")) for node in present]
    if missing := [role for role in ("server", "worker") if role not in roles]:
        detail = f"{len(present)} joined, but no {missing[0]}"
        return warned("nodes", detail, f"start `downpour {missing[0]} start` on at least one host")
    return passed("nodes", f"{_count(roles, 'server')}, {_count(roles, 'worker')}")


def _hidden(node: dict[str, Any], present: Sequence[dict[str, Any]]) -> bool:
    """Whether shards on ``node`` are out of reach for another host."""
    if node.get("role") != "server" or len({str(other.get("host")) for other in present}) < 2:
        return False
    try:
        return ipaddress.ip_address(str(node.get("address", ""))).is_loopback
    except ValueError:
        return False


def _names(some: Iterable[dict[str, Any]]) -> str:
    names = [str(node.get("node", "?")) for node in some]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _count(roles: Sequence[str], role: str) -> str:
    number = roles.count(role)
    return f"{number} {role}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
