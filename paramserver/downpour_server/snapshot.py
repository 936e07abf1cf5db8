"""Snapshots of a shard: a consistent capture in memory, then a file written beside the training.

In the synchronous mode a capture has a clock: each trainable chunk is copied at the moment its version reaches
it, so the files of all shards hold the same round. In the others it is what each chunk holds now.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from downpour_common.tensorfile import TensorHead, write_tensors
from downpour_server.coding import residual_name
from downpour_server.store import StoredChunk
from downpour_server.tensors import as_bytes


@dataclass(slots=True)
class Reading:
    """Whether captured tensors have been read; until ``done`` they stay as they are."""

    done: bool = False


@dataclass(frozen=True, slots=True)
class WriteSnapshot:
    """Effect: write ``tensors`` into ``folder`` and report ``document``; or report ``error`` when it is not empty.

    ``reading`` is to be told when the tensors are not needed any more.
    """

    snapshot: int
    folder: str
    shard: int
    tensors: Mapping[str, torch.Tensor]
    document: dict[str, Any]
    error: str = ""
    reading: Reading = field(default_factory=Reading)


@dataclass(slots=True)
class Capture:
    """A snapshot being collected. ``at_clock`` -1: now."""

    snapshot: int
    folder: str
    at_clock: int
    shard: int
    chunks: Mapping[int, StoredChunk]
    waiting: Callable[[StoredChunk], Collection[tuple[int, int]]]
    """slot and number of contributions that wait for their round, and so are not in the snapshot"""
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _rows: dict[str, Any] = field(default_factory=dict)
    _reading: Reading = field(default_factory=Reading)
    _passed: str = ""
    _position: tuple[int, ...] = ()
    _asked: set[int] = field(default_factory=set)
    _owed: set[tuple[int, int]] = field(default_factory=set)
    """chunk and slot of residuals that are to come"""

    def look(self, stored: StoredChunk, position: tuple[int, ...], begins: bool = False) -> None:
        """Take ``stored`` if this is its moment; ``position`` is that of the newest contribution seen. ``begins``: the
        chunk has come to its clock before, and workers may owe something else by now."""
        index = stored.chunk.index
        if stored.chunk.kind != "trainable" or str(index) in self._rows:
            return
        late = begins and stored.coded_push and self.at_clock >= 0
        if self.at_clock < 0 or (stored.version == self.at_clock and not late):
            self._take(stored)
            self._position = max(self._position, position)
        elif stored.version >= self.at_clock:
            self._passed = f"chunk {index} is at clock {stored.version} already, past {self.at_clock}"

    def effect(self) -> WriteSnapshot | None:
        """The finished snapshot, or None while chunks are missing."""
        if self._passed:
            return self.failed(self._passed)
        if self._owed or any(s.chunk.kind == "trainable" and str(i) not in self._rows for i, s in self.chunks.items()):
            return None
        for stored in self.chunks.values():
            if str(stored.chunk.index) not in self._rows:
                self._take(stored)
        trainable = [str(i) for i, s in self.chunks.items() if s.chunk.kind == "trainable"]
        versions = {int(self._rows[i]["version"]) for i in trainable}
        document = {
            "chunks": self._rows,
            "trainable_versions": sorted(versions),
            "position": list(self._position),
        }
        return WriteSnapshot(self.snapshot, self.folder, self.shard, self._tensors, document, reading=self._reading)

    def ask(self, chunk: int, slots: Iterable[int]) -> list[int]:
        """Of these slots, those whose residual of ``chunk`` is to be asked for now; in a snapshot of a clock, once for
        each chunk that has been taken."""
        if self.at_clock < 0 or chunk in self._asked or str(chunk) not in self._rows:
            return []
        self._asked.add(chunk)
        asked = sorted(slots)
        self._owed |= {(chunk, slot) for slot in asked}
        return asked

    def take_residual(self, snapshot: int, chunk: int, slot: int, residual: torch.Tensor) -> None:
        """A worker's answer; one to another snapshot changes nothing."""
        if snapshot == self.snapshot and (chunk, slot) in self._owed:
            self._owed.remove((chunk, slot))
            self._tensors[f"{chunk}.{residual_name(slot)}"] = residual

    def release(self, slot: int) -> None:
        """The worker in ``slot`` is gone, and what it owes with it."""
        self._owed = {(chunk, owing) for chunk, owing in self._owed if owing != slot}

    def failed(self, error: str) -> WriteSnapshot:
        """The snapshot that is not to be."""
        self._reading.done = True
        return WriteSnapshot(self.snapshot, self.folder, self.shard, {}, {}, error)

    def _take(self, stored: StoredChunk) -> None:
        tensors, row = stored.capture(self._reading, self.waiting(stored))
        index = stored.chunk.index
        self._rows[str(index)] = row
        self._tensors.update({f"{index}.{name}": tensor for name, tensor in tensors.items()})


def write(effect: WriteSnapshot) -> dict[str, Any]:
    """Write the file; returns the shard's entry in the manifest. Raises :class:`CheckpointError`."""
    os.makedirs(effect.folder, exist_ok=True)
    name = f"shard-{effect.shard}.safetensors"
    path = os.path.join(effect.folder, name)
    heads = [
        TensorHead(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in effect.tensors.items()
    ]
    digest = write_tensors(path, heads, map(as_bytes, effect.tensors.values()))
    return {"file": name, "bytes": os.path.getsize(path), "sha256": digest, **effect.document}
