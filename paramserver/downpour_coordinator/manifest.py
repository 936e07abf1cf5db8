"""The manifest of a checkpoint: which files belong to it, what they hold, and where the training was.

A JSON object. Its last field is the SHA-256 of all others as they are written here, so that whatever has become of the
file is noticed; with the digests of the other files in it, it vouches for the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from downpour_common.errors import CheckpointError, ProtocolError
from downpour_common.layout import Layout, ModelSpec, plan

FORMAT = 1
MOST_SHARDS = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says, once it has been found to be sound."""

    fields: dict[str, Any]
    layout: Layout

    @property
    def files(self) -> list[dict[str, Any]]:
        """An entry for each file: ``file``, ``bytes``, ``sha256``, ``chunks``."""
        found: list[dict[str, Any]] = self.fields["files"]
        return found

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(int(entry["bytes"]) for entry in self.files)


def encode(fields: dict[str, Any]) -> bytes:
    """``fields`` as the file's bytes, with their digest."""
    plain = {name: value for name, value in fields.items() if name != "sha256"}
    return _text({**plain, "sha256": _digest(plain)})


def decode(data: bytes, path: str) -> Manifest:
    """The inverse of :func:`encode`, everything checked. Raises :class:`CheckpointError` that names ``path``."""
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        if fields["format"] != FORMAT:
            raise CheckpointError(path, f"has format {fields['format']}, this version reads {FORMAT}")
        digest = fields.pop("sha256")
        if digest != _digest(fields):
            raise CheckpointError(path, "does not match its own digest: it is damaged")
        if not 1 <= fields["shards"] <= MOST_SHARDS:
            raise ValueError(f"{fields['shards']} shards")
        layout = plan(ModelSpec.from_wire(fields["model"]), fields["shards"], fields["chunk_bytes"])
        int(fields["clock"]), int(fields["seed"]), int(fields["data"]["epoch"])
        named = _chunks_named(fields["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, ProtocolError) as error:
        raise CheckpointError(path, f"cannot be used: {type(error).__name__}: {error}") from None
    missing = {chunk.index for chunk in layout.chunks} - named
    if missing:
        raise CheckpointError(path, f"names no file for {len(missing)} of the model's {len(layout.chunks)} chunks")
    if len(named) > len(layout.chunks):
        raise CheckpointError(path, "names chunks that the model does not have")
    return Manifest(fields, layout)


def _chunks_named(entries: list[dict[str, Any]]) -> set[int]:
    """The chunks that the files hold. Raises ``ValueError`` and the like for an entry that makes no sense."""
    names: set[str] = set()
    chunks: set[int] = set()
    for entry in entries:
        name, size, digest = entry["file"], entry["bytes"], entry["sha256"]
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "manifest.json":
            raise ValueError(f"{name!r} is no name of a file in a checkpoint")
        if name in names:
            raise ValueError(f"{name} is named twice")
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"{name} has no size and digest")
        here = {int(index) for index in entry["chunks"]}
        if here & chunks:
            raise ValueError(f"{name} holds chunks that another file holds")
        names.add(name)
        chunks |= here
    return chunks


def _text(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_text(fields)).hexdigest()
