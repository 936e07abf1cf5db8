"""What a job asks of whoever carries it: ``downpour run`` or the coordinator of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from downpour_common import messages as m
from downpour_common.messages import Message
from downpour_common.transport import Peer
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: send ``message`` to ``peer``."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class LogRow:
    """Effect: append ``row`` to the run's metrics."""

    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StorePart:
    """Effect: put the bytes of ``part`` into the snapshot's folder, and answer ``peer`` with what is held."""

    peer: Peer
    part: m.SnapshotPart


@dataclass(frozen=True, slots=True)
class StoreSpans:
    """Effect: append what a traced worker has done to the run's spans, and answer ``peer``."""

    peer: Peer
    spans: m.Spans


TrainingEffect = Send | LogRow | CommitSnapshot | SnapshotFailed | StorePart | StoreSpans


@dataclass(frozen=True, slots=True)
class Export:
    """Effect: write ``model.safetensors`` from checkpoint ``number``; answered by ``Lifecycle.exported``."""

    number: int


@dataclass(frozen=True, slots=True)
class ForgetSnapshot:
    """Effect: delete what there is of checkpoint ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Prune:
    """Effect: delete all but the ``keep`` newest checkpoints."""

    keep: int


@dataclass(frozen=True, slots=True)
class FindCheckpoint:
    """Effect: find the newest sound checkpoint; answered by ``Lifecycle.checkpoint_found``."""


@dataclass(frozen=True, slots=True)
class FindShardCheckpoint:
    """Effect: find the newest checkpoint after number ``after`` that is sound for these shards; answered by
    ``Lifecycle.shard_checkpoint_found``."""

    after: int
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpecChanged:
    """Effect: the job's description is another one now; keep it where others read it."""


Effect = TrainingEffect | SpecChanged | Export | ForgetSnapshot | Prune | FindCheckpoint | FindShardCheckpoint
