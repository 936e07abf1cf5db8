"""What the parts of a shard's state machine have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from downpour_server.attached import AttachedMemory, Lodging
from downpour_server.columns import Columns
from downpour_server.members import Members
from downpour_server.passes import Passes, Trail
from downpour_server.policy import Gate
from downpour_server.refusals import Refusals
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk


@dataclass(frozen=True, slots=True)
class Common:
    """One object of each for all parts of a shard, for its whole life."""

    chunks: Mapping[int, StoredChunk]
    trainable: tuple[StoredChunk, ...]
    gates: Mapping[int, Gate]
    """by chunk"""
    members: Members
    columns: Columns
    passes: Passes
    trail: Trail | None
    attached: dict[int, AttachedMemory]
    """by slot"""
    lodging: Lodging
    stats: ShardStats
    refusals: Refusals
    numbered: bool
    """contributions are meant for a round, and named by it (``sync``)"""
