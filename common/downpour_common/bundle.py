"""A script's folder as one file, known by its SHA-256: the code that ``downpour submit`` sends to a cluster.

::

    8 bytes   b"DPBUND01"
    8 bytes   length of the header, little-endian
    header    JSON: [[path, size in bytes, executable], …], ascending by path, without spaces
    data      the files' bytes in that order; nothing between them, nothing after

A format of our own, since tar can say far more than is wanted (links, devices, owners, times, sparse files, several
kinds of long names, a second archive behind the first), all of which a reader has to refuse. Here it cannot be said: a
bundle holds regular files with one bit about each, and all is declared in front and checked before the first byte is
written. A tree has exactly one bundle, whatever the times, owners and order of its files. Nothing is compressed, so
nothing can unfold into more than its size.

Empty folders do not travel. Files are read and written in pieces; only the header is ever in memory as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from downpour_common.bundle_files import LIMITS, BundledFile, Limits, collect, parents, tree_problems
from downpour_common.errors import BundleError
from downpour_common.sizes import format_bytes

__all__ = ["LIMITS", "Bundle", "BundledFile", "Limits", "digest_of", "pack", "unpack"]

MAGIC = b"DPBUND01"
_PREFIX = len(MAGIC) + 8
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was packed or unpacked: SHA-256 in hex and size in bytes of the bundle's file, and the files in it."""

    digest: str
    nbytes: int
    files: tuple[BundledFile, ...]


def pack(folder: str, target_path: str, limits: Limits = LIMITS) -> Bundle:
    """Write the files of ``folder`` that are not ignored (see :mod:`downpour_common.ignore`) to ``target_path``.

    The target appears when it is complete, replaces what was there, and is its owner's alone; it must not lie in what
    travels. Raises :class:`BundleError` for links and other things that cannot travel, for too much, for files that
    change meanwhile and for failures of the system; the target is as before then.
    """
    files = collect(folder, limits)
    digest = hashlib.sha256()
    with _system_errors(folder, target_path), _new_file(target_path) as target:

        def put(part: bytes) -> None:
            digest.update(part)
            target.write(part)

        header = _encode(files)
        put(MAGIC)
        put(len(header).to_bytes(8, "little"))
        put(header)
        for item in files:
            _copy_in(folder, item, put)
        nbytes = target.tell()
    return Bundle(digest.hexdigest(), nbytes, files)


def unpack(path: str, folder: str, expected_digest: str, limits: Limits = LIMITS) -> Bundle:
    """Check the bundle at ``path`` as a whole, then make ``folder`` from it, which appears when it is complete.

    ``folder`` must not exist, its parent must; it is its owner's alone (0700), files in it are 0644 or 0755. What is
    written is what has the digest, even if ``path`` is changed meanwhile. Not made durable: after a loss of power
    unpack again. Raises :class:`BundleError` and leaves nothing behind then.
    """
    if os.path.lexists(folder):
        raise BundleError(folder, "exists already; a bundle is unpacked to a new folder")
    with _system_errors(path, folder), open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        most = _PREFIX + _header_limit(limits) + limits.total_bytes
        if nbytes > most:
            raise BundleError(path, f"{format_bytes(nbytes)}, more than a bundle may have ({format_bytes(most)})")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected_digest:
            raise BundleError(path, f"has the SHA-256 {digest}, expected {expected_digest}; send it again")
        file.seek(0)
        seen = hashlib.sha256()

        def take(size: int) -> Iterator[bytes]:
            for part in _parts(file, size):
                seen.update(part)
                yield part

        files = _read_header(path, take, nbytes, limits)
        with _new_folder(folder) as temporary:
            _write_tree(temporary, files, take)
            if seen.hexdigest() != digest:
                raise BundleError(path, "changed while it was unpacked")
    return Bundle(digest, nbytes, files)


def digest_of(path: str) -> str:
    """The SHA-256 of the file in hex. Raises :class:`OSError`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- header


def _encode(files: Sequence[BundledFile]) -> bytes:
    rows = [[item.path, item.size, item.executable] for item in files]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()


def _header_limit(limits: Limits) -> int:
    """Bytes of the longest header: every byte of every path escaped, and 40 for brackets, size and flag."""
    return 2 + limits.files * (2 * limits.path_bytes + 40)


def _read_header(
    path: str, take: Callable[[int], Iterator[bytes]], nbytes: int, limits: Limits
) -> tuple[BundledFile, ...]:
    prefix = b"".join(take(_PREFIX))
    if len(prefix) < _PREFIX or not prefix.startswith(MAGIC):
        raise BundleError(path, "is not a bundle")
    length = int.from_bytes(prefix[len(MAGIC) :], "little")
    if length > min(nbytes - _PREFIX, _header_limit(limits)):
        raise BundleError(path, f"its header claims {length} bytes")
    header = b"".join(take(length))
    try:
        files = tuple(_row(*row) for row in json.loads(header))
        one_of_its_kind = _encode(files) == header
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(path, f"its header cannot be read: {type(error).__name__}") from None
    if not one_of_its_kind:
        raise BundleError(path, "its header is not written as bundles are")
    problems = tree_problems(files, limits)
    data = nbytes - _PREFIX - length
    if sum(item.size for item in files) != data:
        problems.append(f"holds {data} bytes of data, and its header claims {sum(item.size for item in files)}")
    if problems:
        raise BundleError(path, *problems)
    return files


def _row(path: Any, size: Any, executable: Any) -> BundledFile:
    if type(path) is not str or type(size) is not int or size < 0 or type(executable) is not bool:
        raise TypeError("expected [path, size, executable]")
    return BundledFile(path, size, executable)


# ---------------------------------------------------------------- data


def _parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next ``size`` bytes in pieces; fewer when the file ends."""
    while size and (part := file.read(min(size, _PIECE))):
        size -= len(part)
        yield part


def _copy_in(folder: str, item: BundledFile, put: Callable[[bytes], None]) -> None:
    # Between the look at the folder and now a file may have become a link (NOFOLLOW) or a pipe (NONBLOCK).
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    copied = 0
    with open(os.open(os.path.join(folder, item.path), flags), "rb") as source:
        for part in _parts(source, item.size):
            put(part)
            copied += len(part)
        if copied != item.size or source.read(1):
            raise BundleError(folder, f"{item.path}: changed while it was packed; submit again when it is at rest")


def _write_tree(folder: str, files: Sequence[BundledFile], take: Callable[[int], Iterator[bytes]]) -> None:
    """``folder`` is new and ours, and the paths are checked: no link can stand in the way."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    made: set[str] = set()
    for item in files:
        for parent in parents(item.path):
            if parent not in made:
                os.mkdir(os.path.join(folder, parent), 0o755)
                made.add(parent)
        path = os.path.join(folder, item.path)
        mode = 0o755 if item.executable else 0o644
        with open(os.open(path, flags, mode), "wb") as target:
            os.fchmod(target.fileno(), mode)  # whatever the umask
            for part in take(item.size):
                target.write(part)


# ---------------------------------------------------------------- all or nothing


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[IO[bytes]]:
    """A file beside ``path`` that takes its place at the end, or vanishes."""
    handle, temporary = tempfile.mkstemp(prefix=".packing-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with open(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _new_folder(path: str) -> Iterator[str]:
    """A folder beside ``path`` that takes its name at the end, or vanishes."""
    temporary = tempfile.mkdtemp(prefix=".unpacking-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _system_errors(path: str, target: str) -> Iterator[None]:
    """``target`` is meant when an error names no file: a disk that is full, for one."""
    try:
        yield
    except OSError as error:
        where = error.filename or target
        raise BundleError(path, f"{'' if where == path else f'{where}: '}{error.strerror or error}") from error
