"""The parameter space: which byte of the model lives on which shard, in which chunk.

Every process computes the layout for itself from the same :class:`ModelSpec`, so only the specification
travels. Tensors of one kind, dtype and parameter group form a *segment*, a flat vector in the reverse of the
model's own order (what backward finishes first comes first). Each kind's segments, laid end to end, are cut
into ``shards`` ranges of equal bytes; big tensors are split, so balance holds by construction. Ranges are cut
into chunks, the unit of transfer, application and versioning; a chunk never spans two segments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

from downpour_common.dtypes import TRAINABLE, itemsize
from downpour_common.errors import ProtocolError

Kind = Literal["trainable", "buffer", "frozen"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model.

    ``name`` is its first name in the state dict, ``aliases`` its further names (tied weights); ``group`` is the
    index of its optimizer parameter group, -1 where it has none.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    group: int = -1

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * itemsize(self.dtype)

    def describe(self) -> str:
        """For error messages: what this tensor is."""
        group = f", parameter group {self.group}" if self.group >= 0 else ""
        return f"{self.name} ({self.kind} {self.dtype}{list(self.shape)}{group})"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What all workers of a job must agree on: tensors, update rule, rule for buffers.

    ``rule`` is the update rule's registry name, ``options`` holds for each parameter group the options that the
    rule is made with (plain numbers, booleans and lists).
    """

    tensors: tuple[TensorSpec, ...]
    rule: str
    options: tuple[Mapping[str, Any], ...]
    buffers: str

    def to_wire(self) -> dict[str, Any]:
        """A document of plain values for msgpack and JSON."""
        return {
            "tensors": [[t.name, list(t.aliases), list(t.shape), t.dtype, t.kind, t.group] for t in self.tensors],
            "rule": self.rule,
            "options": [dict(o) for o in self.options],
            "buffers": self.buffers,
        }

    @classmethod
    def from_wire(cls, document: Mapping[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_wire`; raises :class:`ProtocolError` for anything malformed."""
        try:
            tensors = tuple(_tensor_from_wire(row) for row in document["tensors"])
            options = tuple(dict(row) for row in document["options"])
            rule, buffers = document["rule"], document["buffers"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"malformed model specification: {error!r}") from None
        if not (isinstance(rule, str) and isinstance(buffers, str)):
            raise ProtocolError("malformed model specification: rule and buffers must be strings")
        if any(t.group >= len(options) for t in tensors):
            raise ProtocolError("malformed model specification: a tensor names a parameter group that is not there")
        names = [name for t in tensors for name in (t.name, *t.aliases)]
        if len(set(names)) < len(names):
            raise ProtocolError("malformed model specification: two tensors have one name")
        return cls(tensors, rule, options, buffers)

    @property
    def digest(self) -> str:
        """Hex digest of all that fixes the layout; equal digests mean interchangeable chunks."""
        document = self.to_wire()
        fixed = {"tensors": document["tensors"], "rule": self.rule, "buffers": self.buffers}
        return hashlib.sha256(json.dumps(fixed, separators=(",", ":")).encode()).hexdigest()[:32]

    def first_difference(self, other: ModelSpec) -> str | None:
        """What first makes ``other`` a different model than this one, or None."""
        for ours, theirs in zip(self.tensors, other.tensors, strict=False):
            if ours != theirs:
                return f"expected {ours.describe()}, found {theirs.describe()}"
        if len(self.tensors) != len(other.tensors):
            longer = max(self, other, key=lambda spec: len(spec.tensors))
            extra = longer.tensors[min(len(self.tensors), len(other.tensors))]
            return f"{extra.describe()} is {'missing' if longer is self else 'not part of the job'}"
        if self.rule != other.rule:
            return f"expected optimizer {self.rule}, found {other.rule}"
        if self.buffers != other.buffers:
            return f"expected buffers={self.buffers!r}, found {other.buffers!r}"
        if len(self.options) != len(other.options):
            return f"expected {len(self.options)} parameter groups, found {len(other.options)}"
        return None


def _tensor_from_wire(row: Any) -> TensorSpec:
    name, aliases, shape, dtype, kind, group = row
    if not (type(name) is str and type(aliases) is list and all(type(a) is str for a in aliases)):
        raise ValueError(f"bad name or aliases in {row!r}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"bad shape {shape!r} of {name}")
    if kind not in KINDS or type(group) is not int or (group >= 0) != (kind == "trainable") or group < -1:
        raise ValueError(f"{name} cannot be {kind!r} in parameter group {group!r}")
    if itemsize(dtype) and kind == "trainable" and dtype not in TRAINABLE:
        raise ValueError(f"{name} cannot be trained as {dtype}")
    return TensorSpec(name, tuple(aliases), tuple(shape), dtype, kind, group)


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor lies in its segment: ``tensor`` indexes ``ModelSpec.tensors``; offsets in elements."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A flat vector of all tensors of one kind, dtype and parameter group."""

    index: int
    kind: Kind
    dtype: str
    group: int
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return self.pieces[-1].stop if self.pieces else 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``start:stop`` of segment ``segment``, held by shard ``shard``; ``index`` is unique in the job."""

    index: int
    shard: int
    segment: int
    kind: Kind
    dtype: str
    group: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True)
class Layout:
    """The whole parameter space of a job."""

    model: ModelSpec
    shards: int
    chunk_bytes: int
    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    digest: str = field(compare=False)

    def of_shard(self, shard: int) -> tuple[Chunk, ...]:
        """The chunks that ``shard`` holds."""
        return tuple(c for c in self.chunks if c.shard == shard)

    @cached_property
    def by_kind(self) -> dict[Kind, tuple[Chunk, ...]]:
        """Chunks of each kind, in the order in which they lie in the parameter space."""
        return {kind: tuple(c for c in self.chunks if c.kind == kind) for kind in KINDS}

    def pieces_of(self, chunk: Chunk) -> Iterable[tuple[TensorSpec, int, int, int]]:
        """The tensors in ``chunk``: (tensor, first element within the tensor, offset within the chunk, elements)."""
        for piece in self.segments[chunk.segment].pieces:
            low, high = max(piece.start, chunk.start), min(piece.stop, chunk.stop)
            if low < high:
                yield self.model.tensors[piece.tensor], low - piece.start, low - chunk.start, high - low


SHARED_ALIGN = 64
NONCE_BYTES = 16


@dataclass(frozen=True)
class SharedLayout:
    """Where a worker's trainable segments lie in the memory that it shares with the shards of its host.

    First the weights of each, then the gradients of each, every one at a multiple of ``SHARED_ALIGN`` bytes, then a
    nonce by which both sides know that they look at the same memory.
    """

    layout: Layout

    @cached_property
    def _offsets(self) -> tuple[dict[int, int], dict[int, int], int]:
        at, areas = 0, []
        for _ in range(2):
            area: dict[int, int] = {}
            for segment in self.layout.segments:
                if segment.kind == "trainable":
                    area[segment.index] = at
                    at += segment.numel * itemsize(segment.dtype)
                    at += -at % SHARED_ALIGN
            areas.append(area)
        return areas[0], areas[1], at

    @property
    def nonce_at(self) -> int:
        """Offset of the nonce in bytes."""
        return self._offsets[2]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.nonce_at + NONCE_BYTES

    def weights_at(self, segment: int) -> int:
        """Offset of a segment's weights in bytes."""
        return self._offsets[0][segment]

    def gradients_at(self, segment: int) -> int:
        """Offset of a segment's gradients in bytes."""
        return self._offsets[1][segment]

    def weights(self, chunk: Chunk) -> slice:
        """The bytes of a chunk's weights."""
        return _within(self.weights_at(chunk.segment), chunk)

    def gradient(self, chunk: Chunk) -> slice:
        """The bytes of a chunk's gradient."""
        return _within(self.gradients_at(chunk.segment), chunk)


def _within(area: int, chunk: Chunk) -> slice:
    start = area + chunk.start * itemsize(chunk.dtype)
    return slice(start, start + chunk.nbytes)


def plan(model: ModelSpec, shards: int, chunk_bytes: int) -> Layout:
    """Lay ``model`` out over ``shards`` shards in chunks of at most ``chunk_bytes`` bytes."""
    if shards < 1 or chunk_bytes < 1:
        raise ValueError("shards and chunk_bytes must be positive")
    segments = _segments(model.tensors)
    chunks: list[Chunk] = []
    for kind in KINDS:
        for segment, shard, start, stop in _cut([s for s in segments if s.kind == kind], shards):
            for low, high in _split(start, stop, max(1, chunk_bytes // itemsize(segment.dtype))):
                chunks.append(Chunk(len(chunks), shard, segment.index, kind, segment.dtype, segment.group, low, high))
    return Layout(model, shards, chunk_bytes, segments, tuple(chunks), model.digest)


def _segments(tensors: tuple[TensorSpec, ...]) -> tuple[Segment, ...]:
    members: dict[tuple[int, str, int], list[int]] = {}
    for index in reversed(range(len(tensors))):
        tensor = tensors[index]
        if tensor.numel:
            members.setdefault((KINDS.index(tensor.kind), tensor.dtype, tensor.group), []).append(index)
    segments: list[Segment] = []
    for (kind, dtype, group), indices in sorted(members.items()):
        pieces, at = [], 0
        for index in indices:
            pieces.append(Piece(index, at, at + tensors[index].numel))
            at = pieces[-1].stop
        segments.append(Segment(len(segments), KINDS[kind], dtype, group, tuple(pieces)))
    return tuple(segments)


def _cut(segments: list[Segment], shards: int) -> Iterable[tuple[Segment, int, int, int]]:
    """Cut segments, laid end to end, into ``shards`` ranges of equal bytes: (segment, shard, start, stop)."""
    total = sum(s.numel * itemsize(s.dtype) for s in segments)
    base = 0
    for segment in segments:
        size = itemsize(segment.dtype)
        cuts = [min(max((total * i // shards - base) // size, 0), segment.numel) for i in range(shards + 1)]
        for shard in range(shards):
            if cuts[shard] < cuts[shard + 1]:
                yield segment, shard, cuts[shard], cuts[shard + 1]
        base += segment.numel * size


def _split(start: int, stop: int, limit: int) -> Iterable[tuple[int, int]]:
    """Split ``start:stop`` into the fewest parts of at most ``limit`` elements, of nearly equal size."""
    parts = -(-(stop - start) // limit)
    for part in range(parts):
        yield start + (stop - start) * part // parts, start + (stop - start) * (part + 1) // parts
