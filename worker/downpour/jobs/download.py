"""A job's files, taken from the coordinator to a folder here: all of them, or none and an error."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from downpour.jobs.client import ClusterClient
from downpour.jobs.errors import ResultsDiffer, Unknown
from downpour.jobs.logs import PART_BYTES
from downpour_common.errors import ProtocolError
from downpour_common.messages import FileData, GetFile

MODEL = "model.safetensors"
_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,255}")
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """``written`` and ``unchanged`` are relative paths; ``gone`` were removed at the coordinator meanwhile."""

    folder: str
    written: tuple[str, ...]
    unchanged: tuple[str, ...]
    gone: tuple[str, ...]
    nbytes: int


def wanted(files: Iterable[tuple[str, int]], checkpoints: bool) -> list[tuple[str, int]]:
    """Those of a job's files that a download takes, with or without checkpoints.

    Raises :class:`ProtocolError` for a path that could lead out of the target folder.
    """
    chosen = []
    for path, size in files:
        if size < 0 or not all(_PART.fullmatch(part) for part in path.split("/")):
            raise ProtocolError(f"the coordinator names a file that cannot be one of a job: {path!r:.200}")
        if checkpoints or not path.startswith("checkpoints/"):
            chosen.append((path, size))
    return sorted(chosen)


def download(
    client: ClusterClient,
    job: str,
    files: Iterable[tuple[str, int]],
    folder: str,
    force: bool = False,
    progress: Progress | None = None,
) -> Downloaded:
    """Fetch ``files`` (path, size) of ``job`` into ``folder``, which is made if need be.

    Everything is fetched to a temporary folder inside first, then moved in place. A file that is there already with
    other content stays, and so does all else (:class:`ResultsDiffer`), unless ``force``. Raises :class:`OSError`, and
    what :class:`ClusterClient` raises; nothing has changed then.
    """
    chosen = sorted(files)
    if not force:
        _check([path for path, size in chosen if _other_size(os.path.join(folder, path), size)], folder)
    top = _first_missing(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        temporary = tempfile.mkdtemp(prefix=".downpour-", dir=folder)
        try:
            gone, nbytes = _fetch(client, job, chosen, temporary, progress)
            whole = [path for path, _ in chosen if not _lost(path, gone)]
            same = [p for p in whole if _same(os.path.join(temporary, p), os.path.join(folder, p))]
            new = [path for path in whole if path not in set(same)]
            if not force:
                _check([path for path in new if os.path.lexists(os.path.join(folder, path))], folder)
            for path in new:
                target = os.path.join(folder, path)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(os.path.join(temporary, path), target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except BaseException:
        if top is not None:
            shutil.rmtree(top, ignore_errors=True)
        raise
    return Downloaded(folder, tuple(new), tuple(same), tuple(gone), nbytes)


def _fetch(
    client: ClusterClient, job: str, files: list[tuple[str, int]], folder: str, progress: Progress | None
) -> tuple[list[str], int]:
    """The files that have gone, and the bytes of the others."""
    total, done = sum(size for _, size in files), 0
    gone: list[str] = []
    for path, size in files:
        if _lost(path, gone):
            continue
        target = os.path.join(folder, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            with open(target, "xb") as out:
                for part in read(client, job, path, size):
                    out.write(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
        except Unknown as error:
            if error.kind != "file":
                raise
            gone.append(path)
    return gone, done


def read(client: ClusterClient, job: str, path: str, size: int) -> Iterator[bytes]:
    """The first ``size`` bytes of a file, in parts."""
    spans = [(at, min(PART_BYTES, size - at)) for at in range(0, size, PART_BYTES)]
    answers = client.ask_all(FileData, ((GetFile, job, path, at, length) for at, length in spans))
    for (at, length), data in zip(spans, answers, strict=True):
        part = bytes(data.payload)
        if data.offset != at or len(part) != length:
            raise ProtocolError(f"{path}: the coordinator gave {len(part)} bytes at {at} where it has {length}")
        yield part


def _lost(path: str, gone: Iterable[str]) -> bool:
    """Whether the file has gone, or is part of a checkpoint of which something has: half of one is of no use."""
    folders = defaultdict(bool, {os.path.dirname(g): True for g in gone if g.startswith("checkpoints/")})
    return path in gone or folders[os.path.dirname(path)]


def _check(different: list[str], folder: str) -> None:
    if different:
        raise ResultsDiffer(folder, different)


def _other_size(path: str, size: int) -> bool:
    return os.path.lexists(path) and not (os.path.isfile(path) and os.path.getsize(path) == size)


def _same(one: str, other: str) -> bool:
    return os.path.isfile(other) and filecmp.cmp(one, other, shallow=False)


def _first_missing(folder: str) -> str | None:
    """The topmost folder that making ``folder`` would make."""
    path, missing = os.path.abspath(folder), None
    while not os.path.lexists(path):
        path, missing = os.path.dirname(path), path
    return missing
