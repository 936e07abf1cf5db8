"""Checkpoints in a run directory: ``checkpoints/000001/{manifest.json, shard-0.safetensors, …}``.

A folder counts once its manifest is there. Readers verify sizes and digests, and name what is damaged.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from downpour_common.durable import make_folders, sync
from downpour_common.errors import CheckpointError
from downpour_common.tensorfile import write_atomically
from downpour_coordinator.manifest import encode
from downpour_coordinator.sources import (
    MANIFEST,
    FolderSource,
    Source,
    committed,
    file_problems,
    folder_of,
    manifest_of,
    numbers,
)

__all__ = ["MANIFEST", "Checkpoint", "commit", "committed", "folder_of", "load", "newest", "numbers", "prune", "remove"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: str
    manifest: dict[str, Any]


def commit(folder: str, manifest: dict[str, Any]) -> None:
    """Write the manifest, after everything that it names is on disk for good. Raises :class:`CheckpointError`."""
    try:
        make_folders(folder)
        for entry in manifest.get("files", ()):
            path = os.path.join(folder, entry["file"])
            sync(path)
            if (size := os.path.getsize(path)) != entry["bytes"]:
                raise CheckpointError(path, f"has {size} bytes, its shard says {entry['bytes']}")
        path = os.path.abspath(folder)
        for _ in range(3):  # the folder, the run's checkpoints, the run
            sync(path)
            path = os.path.dirname(path)
    except OSError as error:
        raise CheckpointError(error.filename or folder, f"cannot be committed: {error.strerror or error}") from None
    data = encode({**manifest, "committed_s": round(time.time(), 3)})
    write_atomically(os.path.join(folder, MANIFEST), lambda file: file.write(data))


def load(folder: str) -> Checkpoint:
    """Read and verify one checkpoint. Raises :class:`CheckpointError` naming what is damaged."""
    source = FolderSource(folder)
    number = source.only or 0
    path = os.path.join(folder, MANIFEST)
    if source.only is None:
        raise CheckpointError(path, "is missing")
    manifest = manifest_of(source, number)
    if problems := file_problems(source, number, manifest):
        first, *others = problems
        raise first if not others else CheckpointError(folder, "; ".join(map(str, problems)))
    return Checkpoint(folder, manifest.fields)


def newest(path: str) -> tuple[Checkpoint, list[str]]:
    """The newest sound checkpoint of a run directory (or the one in a checkpoint folder), and what was skipped.

    Raises :class:`CheckpointError` when there is none.
    """
    source: Source = FolderSource(path)
    skipped: list[str] = []
    for number in reversed(source.numbers()):
        try:
            return load(source.where(number, "")), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    detail = "; ".join(skipped) or "it holds no checkpoints/NNNNNN/manifest.json"
    raise CheckpointError(path, f"there is no usable checkpoint to resume from: {detail}")


def newest_for(run: str, after: int, shards: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """Number of the run's newest checkpoint after number ``after`` whose files for these shards are sound, 0 when there
    is none; and what is wrong with newer ones. The other shards' files are not looked at."""
    source = FolderSource(run)
    skipped: list[str] = []
    for number in reversed([n for n in source.numbers() if n > after]):
        try:
            problems = file_problems(source, number, manifest_of(source, number), shards)
        except IndexError:
            problems = [CheckpointError(source.where(number, MANIFEST), "has other shards")]
        except CheckpointError as error:
            problems = [error]
        if not problems:
            return number, tuple(skipped)
        skipped.append(str(problems[0]))
    return 0, tuple(skipped)


def prune(run: str, keep: int) -> None:
    """Delete all but the ``keep`` newest committed checkpoints, and whatever older was never committed."""
    kept = committed(run)[-keep:]
    for number in numbers(run):
        if kept and number < kept[0]:
            remove(run, number)


def remove(run: str, number: int) -> None:
    """Delete a checkpoint, its manifest first: half of one must not look like a whole one that is damaged."""
    folder = folder_of(run, number)
    try:
        os.unlink(os.path.join(folder, MANIFEST))
        sync(folder)
    except OSError:
        pass  # it was never committed, or is gone
    shutil.rmtree(folder, ignore_errors=True)
