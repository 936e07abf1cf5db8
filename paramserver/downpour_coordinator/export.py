"""From a checkpoint to ``model.safetensors``: whole tensors under the model's own names, without torch."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import prod

from downpour_common.dtypes import itemsize
from downpour_common.errors import CheckpointError
from downpour_common.layout import Chunk, Layout, ModelSpec, TensorSpec, plan
from downpour_common.tensorfile import TensorFile, TensorHead, write_tensors
from downpour_coordinator.checkpoints import Checkpoint

BAND_BYTES = 4 << 20
"""Of a tensor that lies in parts, about as much is put together at a time."""


def export_model(checkpoint: Checkpoint, path: str) -> None:
    """Write the model of ``checkpoint`` to ``path``, unsplit; tied weights under each of their names.

    Raises :class:`downpour_common.errors.CheckpointError`.
    """
    manifest = checkpoint.manifest
    layout = plan(ModelSpec.from_wire(manifest["model"]), manifest["shards"], manifest["chunk_bytes"])
    home = {int(i): entry["file"] for entry in manifest["files"] for i in entry["chunks"]}
    if len(home) < len(layout.chunks):
        raise CheckpointError(checkpoint.folder, "names no file for some of the model's chunks")
    heads = [
        TensorHead(name, parts[0].dtype, parts[0].whole_shape)
        for parts in layout.model.parts.values()
        for name in (parts[0].name, *parts[0].aliases)
    ]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(TensorFile(os.path.join(checkpoint.folder, name))) for name in set(home.values())
        }
        data = _Data(layout, {index: files[name] for index, name in home.items()})
        whole = (
            piece
            for parts in layout.model.parts.values()
            for _ in (parts[0].name, *parts[0].aliases)
            for piece in data.whole(parts)
        )
        write_tensors(path, heads, whole, {"format": "pt"})


class _Data:
    """The bytes of tensors, wherever they are. ``files``: by chunk."""

    def __init__(self, layout: Layout, files: dict[int, TensorFile]) -> None:
        self._files = files
        self._spans: dict[TensorSpec, list[tuple[int, Chunk, int, int]]] = {t: [] for t in layout.model.tensors}
        for chunk in layout.chunks:
            for tensor, first, at, count in layout.pieces_of(chunk):
                self._spans[tensor].append((first, chunk, at, count))
        for spans in self._spans.values():
            spans.sort(key=lambda span: span[0])

    def whole(self, parts: Sequence[TensorSpec]) -> Iterator[memoryview]:
        """An unsplit tensor, in pieces."""
        if len(parts) == 1 and parts[0].part is None:
            return self._read(parts[0], 0, parts[0].numel)
        return self._joined(parts)

    def _joined(self, parts: Sequence[TensorSpec]) -> Iterator[memoryview]:
        """Every part is a matrix of bytes, and so is the whole, which has columns of all of them."""
        import numpy as np

        first = parts[0].part
        assert first is not None
        size = itemsize(parts[0].dtype) * prod(first.shape[first.dim + 1 :])
        rows, width = prod(first.shape[: first.dim]), first.shape[first.dim] * size
        if rows == 1:  # one after the other
            pieces = [(start, at, length, t) for t in parts if t.part for at, start, length in t.part.strips if length]
            inner = size // itemsize(parts[0].dtype)
            for _, at, length, tensor in sorted(pieces, key=lambda piece: piece[0]):
                yield from self._read(tensor, at * inner, length * inner)
        if rows == 1 or not rows * width:
            return
        many = max(1, BAND_BYTES // width)
        for top in range(0, rows, many):
            count = min(many, rows - top)
            band = np.empty((count, width), np.uint8)
            for tensor in parts:
                assert tensor.part is not None
                local = tensor.numel // rows
                if not local:
                    continue
                read = b"".join(self._read(tensor, top * local, count * local))
                matrix = np.frombuffer(read, np.uint8).reshape(count, -1)
                for at, start, length in tensor.part.strips:
                    band[:, start * size : (start + length) * size] = matrix[:, at * size : (at + length) * size]
            yield band.reshape(-1).data

    def _read(self, tensor: TensorSpec, start: int, count: int) -> Iterator[memoryview]:
        """``count`` elements of a tensor from ``start`` on."""
        spans, size = self._spans[tensor], itemsize(tensor.dtype)
        for first, chunk, at, length in spans[max(0, bisect_right(spans, start, key=lambda span: span[0]) - 1) :]:
            low, high = max(first, start), min(first + length, start + count)
            if first >= start + count:
                break
            if low < high:
                data = _weights(self._files[chunk.index], chunk)
                yield data[(at + low - first) * size : (at + high - first) * size]


def _weights(file: TensorFile, chunk: Chunk) -> memoryview:
    try:
        return file[f"{chunk.index}.weights"]
    except KeyError:
        raise CheckpointError(file.path, f"does not hold the weights of chunk {chunk.index}") from None
