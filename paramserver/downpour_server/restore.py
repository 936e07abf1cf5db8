"""Start a shard from a checkpoint, whatever number of shards, chunk size or order it was written with, and in whatever
parts the model was cut for the ranks of a replica.

The manifest names the model and how it was laid out, so each element of each tensor can be found again by the
tensor's name. Scalars of the update rule (step counts) are kept per chunk; where a new chunk covers several
old ones it takes the largest.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import Any

import torch

from downpour_common.errors import CheckpointError, ProtocolError
from downpour_common.layout import Layout, ModelSpec, TensorSpec, plan
from downpour_common.tensorfile import TensorFile
from downpour_server.recut import Gathered, Origin, needed, spans_of
from downpour_server.sound import looked_through
from downpour_server.store import StoredChunk
from downpour_server.tensors import torch_dtype


def read_manifest(folder: str) -> dict[str, Any]:
    """The checkpoint's manifest; raises :class:`CheckpointError`."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            manifest: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from None
    return manifest


def restore(folder: str, layout: Layout, chunks: dict[int, StoredChunk]) -> int:
    """Fill ``chunks`` of ``layout`` from the checkpoint in ``folder``; returns its clock.

    Raises :class:`CheckpointError` when a tensor of the model is missing there or has another shape or dtype.
    """
    manifest = read_manifest(folder)
    try:
        old = plan(ModelSpec.from_wire(manifest["model"]), manifest["shards"], manifest["chunk_bytes"])
        rows = {int(i): (entry["file"], row) for entry in manifest["files"] for i, row in entry["chunks"].items()}
        clock = int(manifest["clock"])
    except (KeyError, TypeError, ValueError, ProtocolError) as error:
        raise CheckpointError(folder, f"has an unusable manifest: {error!r}") from None
    if len(rows) < len(old.chunks):
        raise CheckpointError(folder, "names no file for some of the model's chunks")
    _check_same_tensors(folder, old, layout)
    wanted = _files_wanted(old, layout, rows, chunks)
    entries = [entry for entry in manifest["files"] if entry["file"] in wanted]
    with ExitStack() as stack:
        stack.enter_context(looked_through(folder, entries))
        files = {name: stack.enter_context(TensorFile(os.path.join(folder, name))) for name in sorted(wanted)}
        same_rule = old.model.rule == layout.model.rule
        _fill(Origin(old, rows, files, same_rule), layout, chunks)
        if not same_rule and any(not name.endswith(".weights") for file in files.values() for name in file):
            _tell_of_the_state(old.model.rule, layout.model.rule)
    return clock


def _tell_of_the_state(before: str, now: str) -> None:
    """In this process' log."""
    sys.stderr.write(
        f"the checkpoint's optimizer state is that of {before}, and this job's update rule is {now or 'none'}: the "
        "weights go on, and the rule's state begins anew\n"
    )


def _check_same_tensors(folder: str, old: Layout, new: Layout) -> None:
    for tensor in new.model.tensors:
        found = old.model.parts.get(tensor.name)
        if found is None:
            raise CheckpointError(folder, f"does not hold {tensor.describe()}")
        if (found[0].whole_shape, found[0].dtype) != (tensor.whole_shape, tensor.dtype):
            raise CheckpointError(folder, f"holds {found[0].describe()}, the script has {tensor.describe()}")


def _files_wanted(
    old: Layout, new: Layout, rows: dict[int, tuple[str, dict[str, Any]]], chunks: dict[int, StoredChunk]
) -> set[str]:
    spans = spans_of(old)
    return {
        rows[index][0]
        for stored in chunks.values()
        for tensor, first, _, count in new.pieces_of(stored.chunk)
        for index in needed(old, tensor, spans, first, count)
    }


def _fill(origin: Origin, layout: Layout, chunks: dict[int, StoredChunk]) -> None:
    """Give ``chunks`` their values, each as soon as it has all; a part that is cut anew is put together once."""
    gathered = {index: Gathered() for index in chunks}
    pieces: dict[TensorSpec, list[tuple[int, int, int, int]]] = {}
    for index, stored in chunks.items():
        for tensor, first, at, count in layout.pieces_of(stored.chunk):
            pieces.setdefault(tensor, []).append((index, first, at, count))
    open_ = {index: sum(1 for _ in layout.pieces_of(stored.chunk)) for index, stored in chunks.items()}
    for tensor, places in pieces.items():
        same = origin.same(tensor)
        recut = origin.recut(tensor) if same is None else None
        for index, first, at, count in places:
            into, numel = gathered[index], chunks[index].chunk.numel
            if same is not None:
                origin.copy(same, first, count, at, into, numel)
            elif recut is not None:
                into.note({"version": recut.version, "scalars": recut.scalars}, True)
                for what, source in recut.tensors.items():
                    target = into.tensors.setdefault(what, torch.zeros(numel, dtype=source.dtype))
                    target[at : at + count] = source[first : first + count]
            open_[index] -= 1
            if not open_[index]:
                _restore(chunks[index], gathered.pop(index))


def _restore(stored: StoredChunk, found: Gathered) -> None:
    empty = torch.zeros(stored.chunk.numel, dtype=torch_dtype(stored.chunk.dtype))
    stored.restore(found.tensors.pop("weights", empty), {**found.tensors, **found.scalars}, found.version)
