"""Start a shard from a checkpoint, whatever number of shards, chunk size or order it was written with.

The manifest names the model and how it was laid out, so each element of each tensor can be found again by the
tensor's name. Scalars of the update rule (step counts) are kept per chunk; where a new chunk covers several
old ones it takes the largest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from downpour_common.errors import CheckpointError, ProtocolError
from downpour_common.layout import Chunk, Layout, ModelSpec, plan
from downpour_common.tensorfile import TensorFile
from downpour_server.sound import looked_through
from downpour_server.store import StoredChunk
from downpour_server.tensors import from_bytes, torch_dtype


@dataclass(frozen=True, slots=True)
class _Span:
    """Elements of a tensor: ``at`` is their place in the chunk at hand."""

    tensor: str
    first: int
    at: int
    count: int


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
    homes = _homes(old)
    wanted = {
        rows[home.index][0]
        for s in chunks.values()
        for span in _spans(layout, s.chunk)
        for home, _ in homes[span.tensor]
    }
    entries = [entry for entry in manifest["files"] if entry["file"] in wanted]
    with ExitStack() as stack:
        stack.enter_context(looked_through(folder, entries))
        files = {name: stack.enter_context(TensorFile(os.path.join(folder, name))) for name in sorted(wanted)}
        parts = _parts(rows, files)
        for stored in chunks.values():
            _restore_chunk(stored, layout, old, homes, rows, files, parts)
    return clock


def _check_same_tensors(folder: str, old: Layout, new: Layout) -> None:
    known = {t.name: t for t in old.model.tensors}
    for tensor in new.model.tensors:
        found = known.get(tensor.name)
        if found is None:
            raise CheckpointError(folder, f"does not hold {tensor.describe()}")
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(folder, f"holds {found.describe()}, the script has {tensor.describe()}")


def _spans(layout: Layout, chunk: Chunk) -> Iterator[_Span]:
    for tensor, first, at, count in layout.pieces_of(chunk):
        yield _Span(tensor.name, first, at, count)


def _homes(layout: Layout) -> dict[str, list[tuple[Chunk, _Span]]]:
    homes: dict[str, list[tuple[Chunk, _Span]]] = {}
    for chunk in layout.chunks:
        for span in _spans(layout, chunk):
            homes.setdefault(span.tensor, []).append((chunk, span))
    return homes


def _parts(rows: dict[int, tuple[str, dict[str, Any]]], files: dict[str, TensorFile]) -> dict[int, list[str]]:
    """What each old chunk's own file holds of it: ``weights`` and the names of the rule's tensors."""
    parts: dict[int, list[str]] = {}
    for name, file in files.items():
        for key in file:
            index, _, part = key.partition(".")
            if index.isdecimal() and rows.get(int(index), ("",))[0] == name:
                parts.setdefault(int(index), []).append(part)
    return parts


def _restore_chunk(
    stored: StoredChunk,
    layout: Layout,
    old: Layout,
    homes: dict[str, list[tuple[Chunk, _Span]]],
    rows: dict[int, tuple[str, dict[str, Any]]],
    files: dict[str, TensorFile],
    parts: dict[int, list[str]],
) -> None:
    same_rule = old.model.rule == layout.model.rule
    dtype = torch_dtype(stored.chunk.dtype)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, float] = {}
    version = 0
    for span in _spans(layout, stored.chunk):
        for chunk, home in homes[span.tensor]:
            low, high = max(span.first, home.first), min(span.first + span.count, home.first + home.count)
            if low >= high:
                continue
            name, row = rows[chunk.index]
            if "weights" not in parts.get(chunk.index, ()):
                raise CheckpointError(files[name].path, f"does not hold the weights of chunk {chunk.index}")
            version = max(version, row["version"])
            for scalar, value in row["scalars"].items() if same_rule else ():
                scalars[scalar] = max(value, scalars.get(scalar, value))
            for part in parts[chunk.index]:
                if not (same_rule or part == "weights"):
                    continue
                key = f"{chunk.index}.{part}"
                source = from_bytes(files[name][key], files[name].heads[key].dtype)
                target = tensors.setdefault(part, torch.zeros(stored.chunk.numel, dtype=source.dtype))
                count = high - low
                at = span.at + low - span.first
                start = home.at + low - home.first
                target[at : at + count] = source[start : start + count]
    weights = tensors.pop("weights", torch.zeros(stored.chunk.numel, dtype=dtype))
    stored.restore(weights, {**tensors, **scalars}, version)
