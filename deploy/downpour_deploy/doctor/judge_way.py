"""Verdicts about keys, the way to the coordinator, and the address under which this host is reached."""

from __future__ import annotations

import ipaddress

from downpour_common import exitcodes
from downpour_deploy.doctor.facts import ClusterFacts, KeysFacts, WayFacts
from downpour_deploy.doctor.verdict import Verdict, failed, passed, warned

_BRIDGES = ("docker", "br-", "virbr", "cni", "podman", "lxcbr", "lxdbr", "flannel", "veth")
"""Beginnings of the names of interfaces that lead to containers or virtual machines of this host."""
_OTHERS_READ, _OTHERS_WRITE = 0o077, 0o022


# ---------------------------------------------------------------- keys


def keys(facts: KeysFacts, role: str, way: WayFacts | None) -> Verdict:
    """Whether there are keys, and whether they are kept well."""
    if facts.folder is None:
        return _without_keys(facts, role)
    if not facts.exists:
        return failed("keys", f"{facts.folder}: no such folder", "give the folder of this host's keys with --keys")
    if facts.problem:
        return failed("keys", facts.problem, _mend(facts))
    if facts.mode & _OTHERS_WRITE:
        detail = f"{facts.folder} can be changed by other users (mode {facts.mode:04o}), who could add or replace keys"
        return warned("keys", detail, f"chmod 700 {facts.folder}")
    if wide := [f for f in facts.files if f.name.endswith(".key") and f.mode & _OTHERS_READ]:
        detail = f"{wide[0].name} holds a secret and is open to others (mode {wide[0].mode:04o})"
        return warned("keys", detail, f"chmod 600 {facts.folder}/{wide[0].name}")
    elsewhere = way is not None and way.source not in way.addresses  # the route to oneself begins at its end
    if elsewhere and any(f.name == "coordinator.key" for f in facts.files):
        detail = "coordinator.key is here, and whoever has it can pose as the coordinator"
        action = f"rm {facts.folder}/coordinator.key, unless the coordinator runs on this host"
        return warned("keys", detail, action)
    secret = ", ".join(f.name.removesuffix(".key") for f in facts.files if f.name.endswith(".key"))
    return passed("keys", f"{facts.folder} (mode {facts.mode:04o}) has keys of {secret}; presenting {facts.own}")


def _without_keys(facts: KeysFacts, role: str) -> Verdict:
    if facts.declined:
        if facts.local:
            return passed("keys", "none, as --security none says")
        detail = "none, as --security none says: whoever reaches that network can run code on this cluster"
        return warned("keys", detail, "use --keys, unless only people whom you trust reach that network")
    if facts.local:
        return passed("keys", "none were given; on one host they are not asked for")
    detail = "none were given, and without keys no other host is joined"
    return failed(
        "keys", detail, f"give --keys FOLDER with {role}.key and coordinator.pub, made by `downpour keys new`"
    )


def _mend(facts: KeysFacts) -> str:
    modes = {file.name: file.mode for file in facts.files}
    if facts.own not in modes:
        return f"copy {facts.own} from the host where `downpour keys new` was run to {facts.folder}"
    if modes[facts.own] & _OTHERS_READ:
        return f"chmod 600 {facts.folder}/{facts.own}"
    if modes.get("coordinator.pub", 0) & _OTHERS_WRITE:
        return f"chmod 644 {facts.folder}/coordinator.pub"
    return f"copy {facts.own} and coordinator.pub to {facts.folder} again, from the host where they were made"


# ---------------------------------------------------------------- connection


def name(way: WayFacts) -> Verdict:
    """Whether the coordinator's name has an address."""
    if way.addresses:
        found = ", ".join(way.addresses)
        return passed("name", found if found == way.host else f"{way.host} is {found}")
    if way.only_ipv6:
        detail = f"{way.host} has IPv6 addresses only, which downpour does not use yet"
        return failed("name", detail, "give the coordinator's IPv4 address with --join", exitcodes.UNREACHABLE)
    detail = f"{way.host}: {way.resolve_error or 'no address'}"
    action = "correct the name in --join, or enter it in DNS or /etc/hosts"
    return failed("name", detail, action, exitcodes.UNREACHABLE)


def connection(way: WayFacts) -> Verdict:
    """Whether a coordinator may be listening at the port."""
    where = f"{way.host}:{way.port}"
    if way.connect_error:
        detail = f"{where}: {way.connect_error}"
        if "refused" in way.connect_error.lower():
            action = f"start the coordinator so that it listens there: `downpour coordinator start --bind {where}`"
        else:
            action = f"open TCP port {way.port} in the firewalls between this host and {way.host}"
        return failed("connection", detail, action, exitcodes.UNREACHABLE)
    if way.silent:
        action = "look whether the coordinator there hangs or is stopped, or correct the port in --join"
        return failed("connection", f"{where} accepts connections but says nothing", action, exitcodes.UNREACHABLE)
    if not way.mechanism:
        detail = f"{where}: something listens there that is no coordinator"
        return failed("connection", detail, "correct the port in --join", exitcodes.UNREACHABLE)
    return passed("connection", f"{where} accepts connections")


def security(way: WayFacts, keys: KeysFacts, outcome: str) -> Verdict:
    """Whether coordinator and keys accept each other. Something listens that speaks ZeroMQ's protocol."""
    guarded, with_keys = way.mechanism == "CURVE", keys.folder is not None
    where = f"{way.host}:{way.port}"
    if guarded and not with_keys:
        detail = "the coordinator lets nobody in without a key"
        return failed("security", detail, "give the folder of this host's keys with --keys", exitcodes.REFUSED)
    if not guarded and with_keys:
        detail = f"keys are to be used, but what listens at {where} runs without: it proves nothing, encrypts nothing"
        return failed("security", detail, "start the coordinator with --keys", exitcodes.REFUSED)
    match outcome:
        case "answered" if guarded:
            return passed("security", "the keys of both sides are accepted; the connection is encrypted")
        case "answered":
            return _open_coordinator(keys)
        case "refused" if guarded:
            public = keys.own.removesuffix(".key") + ".pub"
            detail = f"the coordinator does not accept {keys.own}"
            action = f"put {public} that belongs to it into the coordinator's folder of keys, and restart it"
            return failed("security", detail, action, exitcodes.REFUSED)
        case "wrong-server-key":
            detail = f"{where} cannot prove to have the key of our coordinator.pub"
            action = "copy coordinator.pub from the coordinator's folder of keys again, or correct --join"
            return failed("security", detail, action, exitcodes.REFUSED)
        case "forbidden":
            detail = f"the coordinator knows {keys.own} under another role"
            return failed("security", detail, "give the folder with the key of this role", exitcodes.REFUSED)
        case "not-tried":
            detail = "the keys cannot be used, so that it was not tried"
            return failed("security", detail, "mend the keys first, as said above")
    detail = f"{where} speaks ZeroMQ's protocol but does not answer as a coordinator does"
    action = "look whether it is overloaded or stopped, or another program; if it is only slow, raise --timeout"
    return failed("security", detail, action, exitcodes.UNREACHABLE)


def _open_coordinator(keys: KeysFacts) -> Verdict:
    if keys.local:
        return passed("security", "the coordinator runs without keys; only this host is meant to reach it")
    detail = "the coordinator runs without keys and encryption: whoever reaches it can run code on this cluster"
    return warned("security", detail, "start the coordinator with --keys, unless only people whom you trust reach it")


# ---------------------------------------------------------------- how others reach this host


def address(way: WayFacts, cluster: ClusterFacts | None, role: str) -> Verdict:
    """Whether the address that this host would advertise can be reached from others. It matters for servers only."""
    interface = way.interface
    found = f"{way.source} ({interface.name})" if interface else way.source
    if role != "server":
        return passed("address", f"{found} on the way to the coordinator; others need not reach it")
    advertise = "start the server with --advertise and an address that the workers' hosts reach"
    if ipaddress.ip_address(way.source).is_loopback:
        if _several_hosts(cluster):
            detail = f"{found} would be advertised for shards, but other hosts have joined, which cannot reach it"
            return warned("address", detail, advertise)
        return passed("address", f"{found} would be advertised for shards: workers on this host only reach them")
    if _own_bridge(way):
        detail = (
            f"{found} would be advertised for shards; it looks like a bridge that only this host's containers reach"
        )
        return warned("address", detail, advertise)
    if way.in_container and not _same_network(way):
        detail = (
            f"{found} would be advertised for shards; this is a container, and the coordinator is outside its network"
        )
        return warned("address", detail, "run the container with the host's network (--network host)")
    return passed("address", f"{found} would be advertised for shards")


def ports(way: WayFacts, role: str) -> Verdict:
    """Whether shards could listen."""
    if way.bind_error:
        detail = f"no port can be opened on {way.source}: {way.bind_error}"
        action = "start the server with --bind and an address of one of this host's interfaces"
        return failed("ports", detail, action) if role == "server" else warned("ports", detail, action)
    low, high = way.ports
    span = f"{low} to {high}" if high else "that the system gives out"
    if role != "server":
        return passed("ports", "this role needs no port that others connect to")
    return passed("ports", f"shards listen on {way.source}, ports {span}: let the workers' hosts through the firewall")


def _several_hosts(cluster: ClusterFacts | None) -> bool:
    nodes = cluster.nodes if cluster is not None else None
    return nodes is not None and len({str(n.get("host", "")) for n in nodes if n.get("state") != "LOST"}) > 1


def _own_bridge(way: WayFacts) -> bool:
    return way.interface is not None and way.interface.name.startswith(_BRIDGES)


def _same_network(way: WayFacts) -> bool:
    if way.interface is None or not way.addresses:
        return False
    network = ipaddress.ip_network(f"{way.interface.address}/{way.interface.prefix}", strict=False)
    return any(ipaddress.ip_address(found) in network for found in way.addresses)
