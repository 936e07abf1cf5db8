"""Which process runs on which node. Pure functions.

Shards are spread over hosts; workers go where most slots are free. A job's first processes are placed together or not
at all (gang), so that no two half-started jobs wait for each other.
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
    there is one.
    """
    rooms = list(rooms)
    hosts = {r.node: r.host or r.node for r in rooms}
    taken = {key: hosts.get(node, node) for key, node in (others or {}).items()}
    places: dict[Key, Place] = {}
    for role in ("server", "worker"):
        keys = [key for key in wanted if key[0] == role]
        labels = spec.server_labels if role == "server" else spec.worker_labels
        fitting = [r for r in rooms if r.role == role and labels.items() <= r.labels.items()]
        gpus = role == "worker" and spec.device != "cpu"
        for number, key in enumerate(keys):
            if gpus and spec.device == "cuda":
                fitting = [r for r in fitting if r.gpus]
            partner = ("server", (key[1] + spec.shards) % (spec.shards * spec.replication))
            room = _best(role, spec, fitting, taken.get(partner, "") if role == "server" and partner != key else "")
            if room is None:
                return _missing(role, spec, len(keys) - number, len(keys), labels)
            room.used += 1
            room.slots -= 1 if room.slots > 0 else 0
            if role == "server":
                room.of_this_job += 1
                room.memory_bytes -= spec.shard_memory
                taken[key] = hosts[room.node]
            places[key] = Place(room.node, room.gpus.pop(0) if gpus and room.gpus else -1)
    return places


def _best(role: str, spec: JobSpec, rooms: list[Room], avoided: str) -> Room | None:
    if role == "server":
        free = [r for r in rooms if r.slots != 0 and r.memory_bytes >= spec.shard_memory]
        return min(free, key=lambda r: ((r.host or r.node) == avoided, r.of_this_job, r.used, r.node), default=None)
    return min((r for r in rooms if r.slots > 0), key=lambda r: (-r.slots, r.used, r.node), default=None)


def _missing(role: str, spec: JobSpec, missing: int, of: int, labels: Mapping[str, str]) -> str:
    where = " on nodes with " + ", ".join(f"{k}={v}" for k, v in labels.items()) if labels else ""
    if role == "server":
        return f"no room for {missing} of {of} shards of {format_bytes(spec.shard_memory)}{where}"
    return f"{missing} of {of} worker slots{' with a GPU' if spec.device == 'cuda' else ''} are missing{where}"


def place_gang(spec: JobSpec, rooms: Sequence[Room], fewest: int, most: int) -> dict[Key, Place] | str:
    """Places for all shards and as many workers as there is room for, between ``fewest`` and ``most``."""
    copies = [replace(room, gpus=list(room.gpus)) for room in rooms]
    places = place(spec, [("server", index) for index in range(spec.shards * spec.replication)], copies)
    if isinstance(places, str):
        return places
    for index in range(most):
        found = place(spec, [("worker", index)], copies)
        if isinstance(found, str):
            return places if index >= fewest else _missing("worker", spec, fewest - index, fewest, spec.worker_labels)
        places |= found
    return places
