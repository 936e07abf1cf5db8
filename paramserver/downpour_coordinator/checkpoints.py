"""Checkpoints in a run directory: ``checkpoints/000001/{manifest.json, shard-0.safetensors, …}``.

A folder counts once its manifest is there. Readers verify sizes and digests, and name what is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from typing import Any

from downpour_common.errors import CheckpointError, ProtocolError
from downpour_common.layout import ModelSpec, plan
from downpour_common.tensorfile import write_atomically

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: str
    manifest: dict[str, Any]


def commit(folder: str, manifest: dict[str, Any]) -> None:
    """Write the manifest durably. Raises :class:`CheckpointError`."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be made: {error.strerror}") from None
    data = json.dumps(manifest, separators=(",", ":")).encode()
    write_atomically(os.path.join(folder, MANIFEST), lambda file: file.write(data))


def folder_of(run: str, number: int) -> str:
    """Where checkpoint ``number`` of the run lies."""
    return os.path.join(run, "checkpoints", f"{number:06d}")


def numbers(run: str) -> list[int]:
    """Numbers of all checkpoint folders of the run, committed or not, ascending."""
    try:
        names = os.listdir(os.path.join(run, "checkpoints"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def committed(run: str) -> list[int]:
    """Numbers of the run's committed checkpoints, ascending."""
    return [n for n in numbers(run) if os.path.exists(os.path.join(folder_of(run, n), MANIFEST))]


def load(folder: str) -> Checkpoint:
    """Read and verify one checkpoint. Raises :class:`CheckpointError` naming what is damaged."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["format"] != 1:
            raise CheckpointError(path, f"has format {manifest['format']}, this version reads 1")
        for entry in manifest["files"]:
            _verify(os.path.join(folder, entry["file"]), entry)
        layout = plan(ModelSpec.from_wire(manifest["model"]), manifest["shards"], manifest["chunk_bytes"])
        missing = {str(c.index) for c in layout.chunks} - {i for entry in manifest["files"] for i in entry["chunks"]}
    except (OSError, ValueError, KeyError, TypeError, ProtocolError) as error:
        raise CheckpointError(path, f"cannot be used: {type(error).__name__}: {error}") from None
    if missing:
        raise CheckpointError(path, f"names no file for {len(missing)} of the model's {len(layout.chunks)} chunks")
    return Checkpoint(folder, manifest)


def newest(path: str) -> tuple[Checkpoint, list[str]]:
    """The newest sound checkpoint of a run directory (or the one in a checkpoint folder), and what was skipped.

    Raises :class:`CheckpointError` when there is none.
    """
    if os.path.exists(os.path.join(path, MANIFEST)):
        return load(path), []
    skipped: list[str] = []
    for number in reversed(numbers(path)):
        folder = folder_of(path, number)
        if not os.path.exists(os.path.join(folder, MANIFEST)):
            continue
        try:
            return load(folder), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    detail = "; ".join(skipped) or "it holds no checkpoints/NNNNNN/manifest.json"
    raise CheckpointError(path, f"there is no usable checkpoint to resume from: {detail}")


def prune(run: str, keep: int) -> None:
    """Delete all but the ``keep`` newest committed checkpoints, and whatever older was never committed."""
    kept = committed(run)[-keep:]
    for number in numbers(run):
        if kept and number < kept[0]:
            shutil.rmtree(folder_of(run, number), ignore_errors=True)


def _verify(path: str, entry: dict[str, Any]) -> None:
    size = os.path.getsize(path)
    if size != entry["bytes"]:
        raise CheckpointError(path, f"has {size} bytes, the manifest says {entry['bytes']}: it is damaged")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise CheckpointError(path, "does not match its digest: it is damaged")
