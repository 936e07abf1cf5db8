"""What shards tell in documents, checked where it comes in: no process of a job may harm the coordinator."""

from __future__ import annotations

import math
from typing import Any

from downpour_common.errors import ProtocolError
from downpour_coordinator.replicas import check_replica

_COUNTERS = (
    *("applied", "bytes_in", "bytes_out", "clock_gap_max", "members", "pid", "refused", "round", "rounds_per_report"),
    "snapshot",
)
BINS = 66
"""Of a histogram of staleness, which is a number of 64 bits at most."""
_SNAPSHOT: dict[str, type] = {
    "file": str,
    "bytes": int,
    "sha256": str,
    "chunks": dict,
    "trainable_versions": list,
    "position": list,
}


def check_report(document: dict[str, Any]) -> None:
    """A shard's counters. Raises :class:`ProtocolError` where one that is used here is not what it should be."""
    for name in ("staleness", "non_finite", "late"):
        if not _histogram(document.get(name, {})):
            raise ProtocolError(f"a report's {name} is no histogram")
    _check_lost(document)
    _check_measures(document)
    check_replica(document)
    for name in _COUNTERS:
        if not _count(document.get(name, 0)):
            raise ProtocolError(f"a report's {name!r} is no count")


def check_snapshot(document: dict[str, Any], shard: int) -> None:
    """A shard's entry in a manifest. Raises :class:`ProtocolError`; its file lies where its parts were put."""
    for name, kind in _SNAPSHOT.items():
        if type(document.get(name)) is not kind:
            raise ProtocolError(f"a snapshot's {name!r} is missing or of the wrong type")
    if document["file"] != f"shard-{shard}.safetensors":
        raise ProtocolError(f"server/{shard} has no file {document['file']!r}")
    if not all(map(_count, [document["bytes"], *document["trainable_versions"], *document["position"]])):
        raise ProtocolError("a snapshot's counts are not counts")
    _check_lost(document)
    cost_s = document.get("cost_s", 0.0)
    if not isinstance(cost_s, (int, float)) or not 0 <= cost_s < math.inf:
        raise ProtocolError("a snapshot's cost_s is no time")
    if not all(i.isdecimal() and isinstance(row, dict) for i, row in document["chunks"].items()):
        raise ProtocolError("a snapshot's chunks are not numbered")


def _check_measures(document: dict[str, Any]) -> None:
    slots, noise = document.get("slots", {}), document.get("noise", [])
    rows = slots.values() if isinstance(slots, dict) and all(str(slot).isdecimal() for slot in slots) else [None]
    if not all(isinstance(row, list) and 2 < len(row) <= BINS + 2 and all(map(_count, row)) for row in rows):
        raise ProtocolError("a report's slots are no histograms")
    if not isinstance(noise, list) or len(noise) not in (0, 3) or not all(map(_number, noise)):
        raise ProtocolError("a report's noise is not three numbers")
    for name in ("cpu_s", "up_s"):
        if not _number(document.get(name, 0.0)) or document.get(name, 0.0) < 0:
            raise ProtocolError(f"a report's {name} is no time")


def _check_lost(document: dict[str, Any]) -> None:
    pushes = document.get("lost_pushes", 0)
    if not _count(document.get("lost", 0)) or not (_count(pushes) or _histogram(pushes)):
        raise ProtocolError("what a shard has lost is no count")


def _histogram(value: object) -> bool:
    return isinstance(value, dict) and all(str(k).isdecimal() and _count(n) for k, n in value.items())


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
