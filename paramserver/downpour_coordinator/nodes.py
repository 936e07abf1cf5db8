"""The hosts of a cluster, as their agents describe them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from downpour_common.errors import ProtocolError
from downpour_common.transport import Peer

_FACTS: dict[str, type | tuple[type, ...]] = {
    "host": str,
    "address": str,
    "cores": int,
    "memory_bytes": int,
    "gpus": int,
    "labels": dict,
    "slots": int,
    "version": str,
    "boot": str,
    "time_s": (int, float),
    "python": str,
    "platform": str,
}


@dataclass(slots=True)
class Node:
    """One agent. ``user`` is the name of its key; ``instance`` changes with every start of the agent."""

    name: str
    role: str
    instance: str
    facts: dict[str, Any]
    user: str = ""
    peer: Peer = b""
    seen_s: float = 0.0
    lost: bool = False
    drained: bool = False
    """a user wants no more processes there"""
    leaving: bool = False
    """the agent is being stopped"""
    reported: dict[tuple[str, str, int, int], dict[str, Any]] = field(default_factory=dict)
    """what the agent has: (job, role, index, epoch) → its line in the heartbeat"""

    @property
    def usable(self) -> bool:
        """Whether processes may be placed there; not before it has been heard of since this process was started."""
        return bool(self.peer) and not (self.lost or self.drained or self.leaving)

    @property
    def state(self) -> str:
        """For people."""
        return "LOST" if self.lost else "DRAINING" if self.drained or self.leaving else "READY"

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {k: v for k, v in asdict(self).items() if k not in ("peer", "reported", "seen_s")}

    @classmethod
    def from_document(cls, document: dict[str, Any], now_s: float) -> Node:
        """The inverse of :meth:`document`; the node is given time to be heard of."""
        return cls(**document, seen_s=now_s)


def reported_processes(heartbeat: dict[str, Any]) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """What an agent has, by (job, role, index, epoch); lines that make no sense are left out."""
    found: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    lines = heartbeat.get("processes")
    for line in lines if isinstance(lines, list) else []:
        match line:
            case {"job": str(job), "role": str(role), "index": int(index), "epoch": int(epoch)}:
                found[job, role, index, epoch] = line
    return found


def checked_facts(document: dict[str, Any]) -> dict[str, Any]:
    """The facts that an agent registers with. Raises :class:`ProtocolError` naming what is missing or strange."""
    for name, kind in _FACTS.items():
        if not isinstance(document.get(name), kind):
            raise ProtocolError(f"the node's {name!r} is missing or of the wrong type")
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in document["labels"].items()):
        raise ProtocolError("the node's labels are not all text")
    if min(document["cores"], document["memory_bytes"], document["gpus"], document["slots"]) < 0:
        raise ProtocolError("the node has less than none of something")
    return {name: document[name] for name in _FACTS}
