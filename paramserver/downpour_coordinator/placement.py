"""Which process runs on which node. Pure functions.

Shards are spread over hosts; workers go where most slots are free, those of one replica to one node, since they speak
to each other there. A job's first processes are placed together or not at all (gang), so that no two half-started jobs
wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from downpour_common.config import JobSpec
from downpour_common.sizes import format_bytes
from downpour_coordinator.processes import Key


@dataclass(slots=True)
class Room:
    """What is free on one node. ``slots``: worker processes, or shards (-1: as many as memory allows)."""

    node: str
    role: str
    labels: Mapping[str, str]
    slots: int
    memory_bytes: int = 0
    gpus: list[int] = field(default_factory=list)
    """indices of free GPUs; one goes to each worker while there are any"""
    used: int = 0
    """processes of any job there"""
    of_this_job: int = 0
    """shards of the job at hand there"""
    host: str = ""
    """what fails together, if not the node alone"""


@dataclass(frozen=True, slots=True)
class Place:
    """A node, and the GPU there for the process or -1."""

    node: str
    gpu: int = -1


def place(
    spec: JobSpec, wanted: Sequence[Key], rooms: Iterable[Room], others: Mapping[Key, str] | None = None
) -> dict[Key, Place] | str:
    """A place for each of ``wanted`` ((role, index) pairs), or why there is none. Changes ``rooms``.

    ``others``: nodes of the job's servers that run. A shard's second process goes to another host than its first if
    there is one. Workers of one replica that are wanted together go to one node, and all of them have GPUs, or none.
    """
    rooms = list(rooms)
    hosts = {r.node: r.host or r.node for r in rooms}
    taken = {key: hosts.get(node, node) for key, node in (others or {}).items()}
    places: dict[Key, Place] = {}
    servers = [key for key in wanted if key[0] == "server"]
    fitting = [r for r in rooms if r.role == "server" and spec.server_labels.items() <= r.labels.items()]
    for number, key in enumerate(servers):
        partner = ("server", (key[1] + spec.shards) % (spec.shards * spec.replication))
        room = _best_for_shard(spec, fitting, taken.get(partner, "") if partner != key else "")
        if room is None:
            return _no_shard(spec, len(servers) - number, len(servers))
        room.used += 1
        room.slots -= 1 if room.slots > 0 else 0
        room.of_this_job += 1
        room.memory_bytes -= spec.shard_memory
        taken[key] = hosts[room.node]
        places[key] = Place(room.node)
    workers = [key for key in wanted if key[0] == "worker"]
    fitting = [r for r in rooms if r.role == "worker" and spec.worker_labels.items() <= r.labels.items()]
    for mates in by_replica(workers, spec.ranks):
        room = _best_for_workers(spec, fitting, len(mates))
        if room is None:
            return _no_workers(
                spec, len(workers) - sum(1 for key in workers if key in places), len(workers), len(mates)
            )
        gpus = spec.device != "cpu" and len(room.gpus) >= len(mates)
        room.used += len(mates)
        room.slots -= len(mates)
        for key in mates:
            places[key] = Place(room.node, room.gpus.pop(0) if gpus else -1)
    return places


def by_replica(workers: Iterable[Key], ranks: int) -> list[list[Key]]:
    """Workers, those of one replica together."""
    found: dict[int, list[Key]] = {}
    for key in workers:
        found.setdefault(key[1] // ranks, []).append(key)
    return list(found.values())


def _best_for_shard(spec: JobSpec, rooms: list[Room], avoided: str) -> Room | None:
    free = [r for r in rooms if r.slots != 0 and r.memory_bytes >= spec.shard_memory]
    return min(free, key=lambda r: ((r.host or r.node) == avoided, r.of_this_job, r.used, r.node), default=None)


def _best_for_workers(spec: JobSpec, rooms: list[Room], count: int) -> Room | None:
    needed = count if spec.device == "cuda" else 0
    free = [r for r in rooms if r.slots >= count and len(r.gpus) >= needed]
    return min(free, key=lambda r: (-r.slots, r.used, r.node), default=None)


def _where(labels: Mapping[str, str]) -> str:
    return " on nodes with " + ", ".join(f"{k}={v}" for k, v in labels.items()) if labels else ""


def _no_shard(spec: JobSpec, missing: int, of: int) -> str:
    return f"no room for {missing} of {of} shards of {format_bytes(spec.shard_memory)}{_where(spec.server_labels)}"


def _no_workers(spec: JobSpec, missing: int, of: int, together: int) -> str:
    kind = " with a GPU" if spec.device == "cuda" else ""
    text = f"{missing} of {of} worker slots{kind} are missing{_where(spec.worker_labels)}"
    return f"{text}; the {together} workers of a replica need a node with as many free" if together > 1 else text


def place_gang(spec: JobSpec, rooms: Sequence[Room], fewest: int, most: int) -> dict[Key, Place] | str:
    """Places for all shards and as many workers as there is room for, between ``fewest`` and ``most``."""
    copies = [replace(room, gpus=list(room.gpus)) for room in rooms]
    places = place(spec, [("server", index) for index in range(spec.shards * spec.replication)], copies)
    if isinstance(places, str):
        return places
    for first in range(0, most, spec.ranks):
        found = place(spec, [("worker", first + rank) for rank in range(spec.ranks)], copies)
        if isinstance(found, str):
            return places if first >= fewest else _no_workers(spec, fewest - first, fewest, spec.ranks)
        places |= found
    return places
