"""Whether a checkpoint's files are what its manifest says, looked at while they are read for what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from downpour_common.errors import CheckpointError


@contextmanager
def looked_through(folder: str, entries: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Raises :class:`CheckpointError` at the start if a file of these ``entries`` of a manifest is missing or has
    another size, and at the end, instead of whatever was found wrong meanwhile, if one has another SHA-256."""
    expected = {os.path.join(folder, e["file"]): (int(e["bytes"]), str(e["sha256"])) for e in entries}
    for path, (size, _) in expected.items():
        try:
            found = os.path.getsize(path)
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from None
        if found != size:
            raise CheckpointError(path, f"has {found} bytes, the manifest says {size}: it is damaged")
    with ThreadPoolExecutor(1, "digest") as beside:
        reading = {path: beside.submit(_sha256, path) for path in expected}
        try:
            yield
        finally:
            for path, (_, digest) in expected.items():
                if reading[path].result() != digest:
                    raise CheckpointError(path, "has another SHA-256 than the manifest says: it is damaged")


def _sha256(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from None
