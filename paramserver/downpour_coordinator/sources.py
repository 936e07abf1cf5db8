"""Places that checkpoints are read from, and what is the matter with those that lie there.

Folders here; :mod:`downpour_coordinator.urls` adds what fsspec reaches, and the command line the jobs of a cluster.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from downpour_common.durable import make_folders, sync
from downpour_common.errors import CheckpointError
from downpour_common.layout import Layout
from downpour_common.tensorfile import BAD_HEADER, HEADER_LIMIT, header_end, read_header, write_atomically
from downpour_coordinator.manifest import Manifest, decode

MANIFEST = "manifest.json"
READ_BYTES = 1 << 20
MANIFEST_BYTES = 256 << 20
"""A larger one is not read."""
_NUMBER = re.compile(r"[0-9]{6,18}")


class Source(Protocol):
    """Checkpoints by number. Methods raise :class:`CheckpointError`, or ``OSError`` where something is missing."""

    place: str
    """for people: the folder, the URL, the job"""

    def numbers(self) -> list[int]:
        """Those that have a manifest, ascending."""

    def where(self, number: int, name: str) -> str:
        """How one of its files is called in messages."""

    def read(self, number: int, name: str) -> Iterator[bytes]:
        """A file's bytes, in parts."""

    def written_s(self, number: int) -> float | None:
        """When its manifest came to be there, in unix seconds; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Found:
    """One checkpoint that lies somewhere, and what is wrong with it."""

    number: int
    place: str
    manifest: Manifest | None
    """None: it cannot be used"""
    written_s: float | None
    problems: tuple[str, ...]
    checked: bool
    """whether its files have been read, too"""


def number_of(name: str) -> int | None:
    """The number that a checkpoint's folder is called after; None for any other name."""
    if not _NUMBER.fullmatch(name) or f"{int(name):06d}" != name:
        return None
    return int(name)


def manifest_bytes(source: Source, number: int) -> bytes:
    """The manifest as it lies there. Raises :class:`CheckpointError`."""
    parts, size = [], 0
    try:
        for part in source.read(number, MANIFEST):
            parts.append(part)
            size += len(part)
            if size > MANIFEST_BYTES:
                raise CheckpointError(source.where(number, MANIFEST), "is too large for a manifest")
    except OSError as error:
        raise CheckpointError(source.where(number, MANIFEST), f"cannot be read: {error.strerror or error}") from None
    return b"".join(parts)


def manifest_of(source: Source, number: int) -> Manifest:
    """A checkpoint's manifest. Raises :class:`CheckpointError`."""
    return decode(manifest_bytes(source, number), source.where(number, MANIFEST))


def examine(source: Source, number: int, files: bool = True) -> Found:
    """What there is of a checkpoint and what is wrong with it; ``files``: read all of it, else the manifest alone."""
    written_s = None
    with suppress(CheckpointError, OSError):
        written_s = source.written_s(number)
    place = source.where(number, "")
    try:
        manifest = manifest_of(source, number)
    except CheckpointError as error:
        return Found(number, place, None, written_s, (str(error),), files)
    told_s = manifest.fields.get("committed_s")
    written_s = float(told_s) if isinstance(told_s, (int, float)) else written_s
    problems = file_problems(source, number, manifest) if files else []
    return Found(number, place, manifest, written_s, tuple(map(str, problems)), files)


def file_problems(
    source: Source, number: int, manifest: Manifest, shards: Sequence[int] | None = None
) -> list[CheckpointError]:
    """What is wrong with the checkpoint's files, or with those of these ``shards``; empty when all is well.

    Raises ``IndexError`` for a shard that it has no file of.
    """
    problems = []
    for entry in manifest.files if shards is None else [manifest.files[shard] for shard in shards]:
        try:
            for _ in verified(source, number, entry, manifest.layout):
                pass
        except CheckpointError as error:
            problems.append(error)
    return problems


def verified(source: Source, number: int, entry: dict[str, Any], layout: Layout) -> Iterator[bytes]:
    """The bytes of one of the checkpoint's files, in parts; raises :class:`CheckpointError` at the end, at the latest,
    when they are not what the manifest's ``entry`` says."""
    path, size, digest, start, end = source.where(number, entry["file"]), 0, hashlib.sha256(), bytearray(), 8
    try:
        for part in source.read(number, entry["file"]):
            size += len(part)
            if size > entry["bytes"]:
                break
            digest.update(part)
            if len(start) < end:
                start += part[: HEADER_LIMIT + 8 - len(start)]
                if end == 8 and len(start) >= 8:
                    with suppress(ValueError):
                        end = header_end(bytes(start[:8]), entry["bytes"])
                del start[max(end, 8) :]
            yield part
    except FileNotFoundError:
        raise CheckpointError(path, "is missing") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from None
    if size != entry["bytes"]:
        found = f"more than {entry['bytes']}" if size > entry["bytes"] else str(size)
        raise CheckpointError(path, f"has {found} bytes, the manifest says {entry['bytes']}: it is damaged")
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(path, "does not match its digest: it is damaged")
    _check_tensors(path, bytes(start), entry, layout)


def _check_tensors(path: str, start: bytes, entry: dict[str, Any], layout: Layout) -> None:
    """Whether the file, which is whole, is of this model and not one of another job."""
    try:
        _, heads, _ = read_header(start[: header_end(start[:8], entry["bytes"])], entry["bytes"])
    except BAD_HEADER as error:
        raise CheckpointError(path, f"is not a safetensors file: {error}") from None
    for index in map(int, entry["chunks"]):
        head, chunk = heads.get(f"{index}.weights"), layout.chunks[index]
        if head is None:
            raise CheckpointError(path, f"does not hold the weights of chunk {index}")
        if (head.dtype, head.nbytes) != (chunk.dtype, chunk.nbytes):
            raise CheckpointError(path, f"holds other weights than this model's as chunk {index}")


# ---------------------------------------------------------------- folders


class FolderSource:
    """The checkpoints of a run directory, or the one in a checkpoint's own folder, which then is number ``only``."""

    def __init__(self, path: str) -> None:
        self.place = path
        self.only: int | None = None
        if os.path.exists(os.path.join(path, MANIFEST)):
            self.only = number_of(os.path.basename(os.path.abspath(path))) or 0

    def numbers(self) -> list[int]:
        """See :class:`Source`."""
        if self.only is not None:
            return [self.only]
        return committed(self.place)

    def where(self, number: int, name: str) -> str:
        """See :class:`Source`."""
        folder = self.place if self.only is not None else folder_of(self.place, number)
        return os.path.join(folder, name) if name else folder

    def read(self, number: int, name: str) -> Iterator[bytes]:
        """See :class:`Source`."""
        with open(self.where(number, name), "rb") as file:
            while part := file.read(READ_BYTES):
                yield part

    def written_s(self, number: int) -> float | None:
        """See :class:`Source`."""
        return os.path.getmtime(self.where(number, MANIFEST))


def folder_of(run: str, number: int) -> str:
    """Where checkpoint ``number`` of the run lies."""
    return os.path.join(run, "checkpoints", f"{number:06d}")


def numbers(run: str) -> list[int]:
    """Numbers of all checkpoint folders of the run, committed or not, ascending."""
    try:
        names = os.listdir(os.path.join(run, "checkpoints"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n for n in map(number_of, names) if n is not None)


def committed(run: str) -> list[int]:
    """Numbers of the run's committed checkpoints, ascending."""
    return [n for n in numbers(run) if os.path.exists(os.path.join(folder_of(run, n), MANIFEST))]


# ---------------------------------------------------------------- from elsewhere to a folder


def fetch(source: Source, number: int, run: str) -> str:
    """Bring a checkpoint into the run directory ``run``, verified on the way; its folder there.

    Raises :class:`CheckpointError` and leaves nothing behind then. One that is there already is left as it is.
    """
    data = manifest_bytes(source, number)
    manifest = decode(data, source.where(number, MANIFEST))
    folder = folder_of(run, number)
    incoming = os.path.join(run, "checkpoints", f"incoming-{os.getpid()}")
    try:
        if os.path.exists(os.path.join(folder, MANIFEST)):
            with open(os.path.join(folder, MANIFEST), "rb") as file:
                if file.read(len(data) + 1) == data and not file_problems(FolderSource(folder), number, manifest):
                    return folder
            raise CheckpointError(folder, f"is another checkpoint {number} than the one of {source.place}")
        make_folders(incoming)
        for entry in manifest.files:
            with open(os.path.join(incoming, entry["file"]), "xb") as out:
                for part in verified(source, number, entry, manifest.layout):
                    out.write(part)
                out.flush()
                os.fsync(out.fileno())
        write_atomically(os.path.join(incoming, MANIFEST), lambda file: file.write(data))
        shutil.rmtree(folder, ignore_errors=True)  # never committed
        os.rename(incoming, folder)
        sync(os.path.dirname(folder))
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return folder
