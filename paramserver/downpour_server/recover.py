"""Bring a shard back exactly as a checkpoint of its own job has it, from its own file alone, while the job goes on.

Unlike :mod:`downpour_server.restore`, which starts a job from any checkpoint of the model, this includes what belongs
to the job's course: chunks as they were cut, versions, and windows against repeats.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from downpour_common.errors import CheckpointError, ProtocolError
from downpour_common.layout import Layout, ModelSpec
from downpour_common.tensorfile import TensorFile
from downpour_server.restore import read_manifest
from downpour_server.sound import looked_through
from downpour_server.store import StoredChunk
from downpour_server.tensors import from_bytes


def recover(folder: str, job: str, shard: int, layout: Layout, chunks: Mapping[int, StoredChunk]) -> int:
    """Fill ``chunks``, all of ``shard`` in ``layout``, from the checkpoint in ``folder``; returns its clock.

    Raises :class:`CheckpointError` when it is of another job or was laid out otherwise, or the shard's file is damaged;
    the chunks are of no use then.
    """
    manifest = read_manifest(folder)
    try:
        clock = int(manifest["clock"])
        _check_same(folder, manifest, job, layout)
        entry = _own_entry(folder, manifest["files"], shard, chunks)
        path = os.path.join(folder, entry["file"])
        rows = {int(index): row for index, row in entry["chunks"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, ProtocolError) as error:
        raise CheckpointError(folder, f"has an unusable manifest: {error!r}") from None
    with looked_through(folder, [entry]):
        try:
            with TensorFile(path) as file:
                _fill(file, rows, chunks.values())
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(path, f"does not hold what the manifest says: {error!r}") from None
    return clock


def _check_same(folder: str, manifest: Mapping[str, Any], job: str, layout: Layout) -> None:
    for name, here in [("job", job), ("shards", layout.shards), ("chunk_bytes", layout.chunk_bytes)]:
        if manifest[name] != here:
            raise CheckpointError(
                folder, f"has {name} {manifest[name]!r}, this shard {here!r}: it cannot go on from it"
            )
    if ModelSpec.from_wire(manifest["model"]).digest != layout.digest:
        raise CheckpointError(folder, "is of another model: this shard cannot go on from it")


def _own_entry(
    folder: str, entries: Iterable[Mapping[str, Any]], shard: int, chunks: Mapping[int, StoredChunk]
) -> Mapping[str, Any]:
    own = {str(index) for index in chunks}
    for entry in entries:
        if set(entry["chunks"]) == own and (own or entry["file"] == f"shard-{shard}.safetensors"):
            return entry
    raise CheckpointError(folder, f"has no file with exactly the chunks of server/{shard}")


def _fill(file: TensorFile, rows: Mapping[int, Mapping[str, Any]], chunks: Collection[StoredChunk]) -> None:
    parts: dict[int, list[tuple[str, str]]] = {c.chunk.index: [] for c in chunks}
    for key in file:
        index, _, part = key.partition(".")
        parts[int(index)].append((part, key))
    for stored in chunks:
        number = stored.chunk.index
        row = rows[number]
        tensors = {part: from_bytes(file[key], file.heads[key].dtype) for part, key in parts[number]}
        for part, tensor in tensors.items():
            if tensor.shape != stored.weights.shape or (part == "weights" and tensor.dtype != stored.weights.dtype):
                raise ValueError(f"{part} of chunk {number}: {tensor.numel()} elements of {tensor.dtype}")
        weights = tensors.pop("weights")
        state = {name: tensor.clone() for name, tensor in tensors.items()}
        stored.restore(weights, {**state, **row["scalars"]}, int(row["version"]), row["windows"])
