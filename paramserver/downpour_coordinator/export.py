"""From a checkpoint to ``model.safetensors``: whole tensors under the model's own names, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

from downpour_common.dtypes import itemsize
from downpour_common.errors import CheckpointError
from downpour_common.layout import Chunk, ModelSpec, plan
from downpour_common.tensorfile import TensorFile, TensorHead, write_tensors
from downpour_coordinator.checkpoints import Checkpoint


def export_model(checkpoint: Checkpoint, path: str) -> None:
    """Write the model of ``checkpoint`` to ``path``; tied weights under each of their names.

    Raises :class:`downpour_common.errors.CheckpointError`.
    """
    manifest = checkpoint.manifest
    layout = plan(ModelSpec.from_wire(manifest["model"]), manifest["shards"], manifest["chunk_bytes"])
    home = {int(i): entry["file"] for entry in manifest["files"] for i in entry["chunks"]}
    if len(home) < len(layout.chunks):
        raise CheckpointError(checkpoint.folder, "names no file for some of the model's chunks")
    spans: dict[str, list[tuple[Chunk, int, int, int]]] = {t.name: [] for t in layout.model.tensors}
    for chunk in layout.chunks:
        for tensor, first, at, count in layout.pieces_of(chunk):
            spans[tensor.name].append((chunk, first, at, count))
    heads = [
        TensorHead(name, tensor.dtype, tensor.shape)
        for tensor in layout.model.tensors
        for name in (tensor.name, *tensor.aliases)
    ]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(TensorFile(os.path.join(checkpoint.folder, name))) for name in set(home.values())
        }

        def data() -> Iterator[memoryview]:
            for tensor in layout.model.tensors:
                size = itemsize(tensor.dtype)
                for _ in (tensor.name, *tensor.aliases):
                    for chunk, _, at, count in sorted(spans[tensor.name], key=lambda span: span[1]):
                        chunk_data = _weights(files[home[chunk.index]], chunk)
                        yield chunk_data[at * size : (at + count) * size]

        write_tensors(path, heads, data(), {"format": "pt"})


def _weights(file: TensorFile, chunk: Chunk) -> memoryview:
    try:
        return file[f"{chunk.index}.weights"]
    except KeyError:
        raise CheckpointError(file.path, f"does not hold the weights of chunk {chunk.index}") from None
