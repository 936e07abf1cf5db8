"""Reading and writing safetensors files, streaming, without torch.

The coordinator and the command line assemble files larger than they want to hold in memory, and know tensors
only as bytes; the ``safetensors`` package asks for all bytes at once. The format is the public one: 8 bytes
little-endian header length, a JSON header, raw data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from downpour_common import failpoints
from downpour_common.dtypes import FROM_SAFETENSORS, ITEMSIZE, SAFETENSORS
from downpour_common.durable import sync
from downpour_common.errors import CheckpointError

Bytes = bytes | bytearray | memoryview

HEADER_LIMIT = 100 << 20
BAD_HEADER = (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What a tensor is: its name in the file, dtype (torch's name) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


def write_tensors(
    path: str, heads: Sequence[TensorHead], data: Iterable[Bytes], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors in the order given: to a temporary name, fsynced, renamed, folder fsynced.

    ``data`` yields bytes whose total is that of ``heads``, cut anywhere. Returns the file's SHA-256 in hex. Raises
    :class:`CheckpointError` when the file cannot be written, and leaves nothing behind then.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for head in heads:
        header[head.name] = {
            "dtype": SAFETENSORS[head.dtype],
            "shape": list(head.shape),
            "data_offsets": [at, at + head.nbytes],
        }
        at += head.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    digest = hashlib.sha256()

    def write(file: IO[bytes]) -> None:
        def put(part: Bytes) -> int:
            digest.update(part)
            return file.write(part)

        put(len(encoded).to_bytes(8, "little"))
        put(encoded)
        written = sum(put(part) for part in data)
        if written != at:
            raise ValueError(f"{path}: {written} bytes of data, the header says {at}")

    write_atomically(path, write)
    return digest.hexdigest()


def write_atomically(path: str, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, make it durable, then rename it to ``path``."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        failpoints.hit("file.write.before")
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            failpoints.hit("file.write.after")
            os.fsync(file.fileno())
        failpoints.hit("file.rename.before")
        os.rename(temporary, path)
        failpoints.hit("file.rename.after")
        sync(os.path.dirname(path))
    except OSError as error:
        raise CheckpointError(path, f"cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed, when all went well
            os.unlink(temporary)


def header_end(start: bytes, size: int) -> int:
    """Where the header ends in a file of ``size`` bytes whose first eight are ``start``. Raises ``ValueError``."""
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise ValueError(f"header of {length} bytes in a file of {size}")
    return 8 + length


def read_header(data: bytes, size: int) -> tuple[dict[str, str], dict[str, TensorHead], dict[str, tuple[int, int]]]:
    """Metadata, heads by name, and where each tensor's bytes lie, from what stands before :func:`header_end`.

    Raises one of :data:`BAD_HEADER` for what is not a header of a file of ``size`` bytes.
    """
    header: dict[str, Any] = json.loads(data[8:])
    metadata: dict[str, str] = header.pop("__metadata__", {})
    heads: dict[str, TensorHead] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, row in header.items():
        head = TensorHead(name, FROM_SAFETENSORS[row["dtype"]], _sizes(row["shape"]))
        start, stop = (len(data) + n for n in _sizes(row["data_offsets"]))
        if not len(data) <= start <= stop <= size or stop - start != head.nbytes:
            raise ValueError(f"tensor {name} lies outside the file")
        heads[name] = head
        places[name] = (start, stop)
    return metadata, heads, places


class TensorFile(Mapping[str, memoryview]):
    """A safetensors file, memory-mapped privately: name → its bytes, writable without changing the file."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(path, f"cannot be read: {error}") from None
        try:
            self._index(self._map)
        except BAD_HEADER as error:
            self._map.close()
            raise CheckpointError(path, f"is not a safetensors file, or damaged: {error}") from None

    def _index(self, data: mmap.mmap) -> None:
        stop = header_end(data[:8], len(data))
        self.metadata, self.heads, self._at = read_header(data[:stop], len(data))

    def __getitem__(self, name: str) -> memoryview:
        start, stop = self._at[name]
        return memoryview(self._map)[start:stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BufferError):  # a view still in use keeps the mapping until it is collected
            self._map.close()


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) is not list or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"not a list of sizes: {values!r}")
    return tuple(values)
