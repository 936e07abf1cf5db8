"""Checkpoints at a URL, through fsspec: ``URL/checkpoints/NNNNNN/``, as in a run directory.

``fsspec`` and what it needs for a scheme are imported when a URL is used. Whatever these raise becomes
:class:`CheckpointError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from downpour_common.errors import CheckpointError, ConfigError
from downpour_coordinator.checkpoints import Checkpoint, load
from downpour_coordinator.manifest import Manifest, decode
from downpour_coordinator.sources import (
    MANIFEST,
    READ_BYTES,
    FolderSource,
    fetch,
    manifest_bytes,
    manifest_of,
    number_of,
    verified,
)


def is_url(text: str) -> bool:
    """Whether this is a URL rather than a path or a job."""
    return "://" in text


def check_url(url: str) -> None:
    """Raise :class:`ConfigError` where fsspec does not know the scheme, or lacks a package for it."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}") from None


class UrlStore:
    """A :class:`downpour_coordinator.sources.Source`, which can also be written to.

    A URL of a run (or of what ``checkpoint_url`` named), or of one checkpoint's own folder.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.place = url
        self.only: int | None = None
        with self._named(url):
            self._fs: Any
            self._fs, root = fsspec.core.url_to_fs(url)
            self._root: str = root.rstrip("/")
            if self._exists(f"{self._root}/{MANIFEST}"):
                self.only = number_of(self._root.rpartition("/")[2]) or 0

    # ------------------------------------------------------------ reading

    def numbers(self) -> list[int]:
        """See :class:`Source`."""
        if self.only is not None:
            return [self.only]
        return [n for n in self.all_numbers() if self._exists(self._path(n, MANIFEST))]

    def all_numbers(self) -> list[int]:
        """Those without a manifest, too."""
        with self._named(self.place):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(f"{self._root}/checkpoints", detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            found = (number_of(str(entry).rstrip("/").rpartition("/")[2]) for entry in entries)
            return sorted(n for n in found if n is not None)

    def where(self, number: int, name: str) -> str:
        """See :class:`Source`."""
        folder = self.place if self.only is not None else f"{self.place.rstrip('/')}/checkpoints/{number:06d}"
        return f"{folder}/{name}" if name else folder

    def read(self, number: int, name: str) -> Iterator[bytes]:
        """See :class:`Source`."""
        with self._named(self.where(number, name)), self._fs.open(self._path(number, name), "rb") as file:
            while part := file.read(READ_BYTES):
                yield part

    def written_s(self, number: int) -> float | None:
        """See :class:`Source`; not every file system knows."""
        try:
            moment: float = self._fs.modified(self._path(number, MANIFEST)).timestamp()
        except Exception:
            return None
        return moment

    def manifest(self, number: int) -> Manifest | None:
        """The checkpoint's, None where there is none. Raises :class:`CheckpointError` for one that is damaged."""
        if not self._exists(self._path(number, MANIFEST)):
            return None
        return manifest_of(self, number)

    # ------------------------------------------------------------ writing

    def put(self, source: FolderSource, number: int, moving: Callable[[], None]) -> None:
        """Copy checkpoint ``number``, verified on the way, its manifest last. ``moving`` is called with every part."""
        data = manifest_bytes(source, number)
        manifest = decode(data, source.where(number, MANIFEST))
        with self._named(self.where(number, "")):
            self._fs.makedirs(self._path(number, ""), exist_ok=True)
            for entry in manifest.files:
                parts = verified(source, number, entry, manifest.layout)
                self._write(self._path(number, entry["file"]), parts, moving)
                if (size := self._fs.size(self._path(number, entry["file"]))) not in (None, entry["bytes"]):
                    raise CheckpointError(self.where(number, entry["file"]), f"has {size} bytes after it was written")
            self._write(self._path(number, MANIFEST), iter((data,)), moving)
            self._fs.invalidate_cache()

    def remove(self, number: int) -> None:
        """Delete a checkpoint, its manifest first."""
        with self._named(self.where(number, "")):
            if self._fs.exists(self._path(number, MANIFEST)):
                self._fs.rm_file(self._path(number, MANIFEST))
            self._fs.rm(self._path(number, ""), recursive=True)
            self._fs.invalidate_cache()

    def _write(self, path: str, parts: Iterator[bytes], moving: Callable[[], None]) -> None:
        with self._fs.open(path, "wb") as file:
            for part in parts:
                file.write(part)
                moving()

    def _path(self, number: int, name: str) -> str:
        folder = self._root if self.only is not None else f"{self._root}/checkpoints/{number:06d}"
        return f"{folder}/{name}" if name else folder

    def _exists(self, path: str) -> bool:
        with self._named(self.place):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(path))

    @contextmanager
    def _named(self, place: str) -> Iterator[None]:
        """Errors of whatever library name the place. A file that is missing stays ``FileNotFoundError``."""
        try:
            yield
        except (CheckpointError, FileNotFoundError):
            raise
        except Exception as error:
            detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            raise CheckpointError(place, f"{type(error).__name__}: {detail}") from None


def fetch_newest(url: str, run: str) -> tuple[Checkpoint, list[str]]:
    """Bring the newest sound checkpoint at ``url`` into the run directory ``run``; it there, and what was skipped.

    Raises :class:`ConfigError` for a URL that cannot be used, :class:`CheckpointError` when there is none.
    """
    check_url(url)
    store = UrlStore(url)
    skipped: list[str] = []
    for number in reversed(store.numbers()):
        try:
            return load(fetch(store, number, run)), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    detail = "; ".join(skipped) or "it holds no checkpoints/NNNNNN/manifest.json"
    raise CheckpointError(url, f"there is no usable checkpoint to resume from: {detail}")
