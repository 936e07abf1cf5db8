"""The parameter space: which byte of the model lives on which shard, in which chunk.

Every process computes the layout for itself from the same :class:`ModelSpec`, so only the specification
travels. Tensors of one kind, cell, dtype and parameter group form a *segment*, a flat vector in the reverse of the
model's own order (what backward finishes first comes first). The segments of each kind and cell, laid end to end,
are cut into ``shards`` ranges of equal bytes; big tensors are split, so balance holds by construction. Ranges are cut
into chunks, the unit of transfer, application and versioning; a chunk never spans two segments.

Where the update rule looks at whole tensors (``ModelSpec.whole``), each trainable tensor is one chunk instead, and the
shards are given tensors so that each has about as many bytes.

A *cell* is what some worker moves apart from the rest: the parts of one rank of a replica, or a layer. There is one,
unless the specification says otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from downpour_common.dtypes import itemsize
from downpour_common.errors import ModelError
from downpour_common.model import KINDS, Kind, ModelSpec, TensorSpec
from downpour_common.parts import Part

__all__ = [
    "KINDS",
    "LARGEST_CHUNK_BYTES",
    "NONCE_BYTES",
    "SHARED_ALIGN",
    "Chunk",
    "Column",
    "Kind",
    "Layout",
    "ModelSpec",
    "Part",
    "Piece",
    "Segment",
    "SharedLayout",
    "TensorSpec",
    "plan",
]


LARGEST_CHUNK_BYTES = 64 << 20
"""What one message can carry."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor lies in its segment: ``tensor`` indexes ``ModelSpec.tensors``; offsets in elements."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A flat vector of all tensors of one kind, dtype, parameter group and cell."""

    index: int
    kind: Kind
    dtype: str
    group: int
    pieces: tuple[Piece, ...]
    cell: int = 0

    @property
    def numel(self) -> int:
        """Elements."""
        return self.pieces[-1].stop if self.pieces else 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``start:stop`` of segment ``segment``, held by shard ``shard``; ``index`` is unique in the job.

    ``shape``: of the tensor that it is, where tensors are kept whole; else None.
    """

    index: int
    shard: int
    segment: int
    kind: Kind
    dtype: str
    group: int
    start: int
    stop: int
    cell: int = 0
    shape: tuple[int, ...] | None = None

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

    def column_of(self, chunk: Chunk) -> int:
        """The rank, of all replicas, that pushes and pulls ``chunk``."""
        return chunk.cell % self.model.ranks

    def of_column(self, rank: int) -> Column:
        """What this rank of a replica pushes and pulls."""
        return Column(self, rank)

    def pieces_of(self, chunk: Chunk) -> Iterable[tuple[TensorSpec, int, int, int]]:
        """The tensors in ``chunk``: (tensor, first element within the tensor, offset within the chunk, elements)."""
        for piece in self.segments[chunk.segment].pieces:
            low, high = max(piece.start, chunk.start), min(piece.stop, chunk.stop)
            if low < high:
                yield self.model.tensors[piece.tensor], low - piece.start, low - chunk.start, high - low


@dataclass(frozen=True)
class Column:
    """What one rank of each replica pushes and pulls; all there is, unless a replica has several ranks."""

    layout: Layout
    rank: int

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Its segments."""
        return tuple(s for s in self.layout.segments if s.cell % self.layout.model.ranks == self.rank)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Its chunks."""
        return tuple(c for c in self.layout.chunks if self.layout.column_of(c) == self.rank)

    @cached_property
    def by_kind(self) -> dict[Kind, tuple[Chunk, ...]]:
        """Its chunks of each kind, in the order in which they lie in the parameter space."""
        return {kind: tuple(c for c in self.chunks if c.kind == kind) for kind in KINDS}

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """By name, its tensors or parts of them, in the model's order."""
        ranks = self.layout.model.ranks
        return {t.name: t for t in self.layout.model.tensors if t.cell % ranks == self.rank}


SHARED_ALIGN = 64
NONCE_BYTES = 16


@dataclass(frozen=True)
class SharedLayout:
    """Where a worker's trainable segments lie in the memory that it shares with the shards of its host.

    First the weights of each, then the gradients of each, every one at a multiple of ``SHARED_ALIGN`` bytes, then a
    nonce by which both sides know that they look at the same memory. ``column``: the worker's rank in its replica.
    """

    layout: Layout
    column: int = 0

    @cached_property
    def _offsets(self) -> tuple[dict[int, int], dict[int, int], int]:
        at, areas = 0, []
        for _ in range(2):
            area: dict[int, int] = {}
            for segment in self.layout.of_column(self.column).segments:
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
    """Lay ``model`` out over ``shards`` shards in chunks of at most ``chunk_bytes`` bytes.

    No chunk belongs to two cells, and each cell is cut over all shards, so that every rank of a replica, which moves
    whole cells, has all shards to move them to. Tensors that are kept whole may be larger than ``chunk_bytes``; raises
    :class:`ModelError` for one that no message can carry.
    """
    if shards < 1 or chunk_bytes < 1:
        raise ValueError("shards and chunk_bytes must be positive")
    segments = _segments(model.tensors)
    chunks: list[Chunk] = []
    homes = _homes(model, shards) if model.whole else {}
    for (kind, cell), together in groupby(segments, key=lambda s: (s.kind, s.cell)):
        if model.whole and kind == "trainable":
            for segment, piece in ((s, p) for s in together for p in s.pieces):
                where = (segment.index, kind, segment.dtype, segment.group, piece.start, piece.stop, cell)
                shape = model.tensors[piece.tensor].shape
                chunks.append(Chunk(len(chunks), homes[piece.tensor], *where, shape))
            continue
        for segment, shard, start, stop in _cut(list(together), shards):
            for low, high in _split(start, stop, max(1, chunk_bytes // itemsize(segment.dtype))):
                number, dtype, group = len(chunks), segment.dtype, segment.group
                chunks.append(Chunk(number, shard, segment.index, kind, dtype, group, low, high, cell))
    return Layout(model, shards, chunk_bytes, segments, tuple(chunks), model.digest)


def _homes(model: ModelSpec, shards: int) -> dict[int, int]:
    """The shard of each trainable tensor, by index in the model. Within a cell, the largest goes first, each to the
    shard with the fewest bytes of the cell, then of all."""
    cells: defaultdict[int, list[int]] = defaultdict(list)
    for index, tensor in enumerate(model.tensors):
        if tensor.kind == "trainable" and tensor.numel:
            cells[tensor.cell].append(index)
            if tensor.nbytes > LARGEST_CHUNK_BYTES:
                raise ModelError(
                    f"{tensor.name} has {tensor.nbytes} bytes, and the update rule {model.rule} needs tensors whole, "
                    f"of which none may have more than {LARGEST_CHUNK_BYTES}; use a rule that acts element by element "
                    "(AdamW, Lion), or split the layer"
                )
    homes: dict[int, int] = {}
    load = [0] * shards
    for cell in sorted(cells):
        own = [0] * shards
        for index in sorted(cells[cell], key=lambda i: (-model.tensors[i].nbytes, i)):
            home = homes[index] = min(range(shards), key=lambda s: (own[s], load[s], s))
            own[home] += model.tensors[index].nbytes
            load[home] += model.tensors[index].nbytes
    return homes


def _segments(tensors: tuple[TensorSpec, ...]) -> tuple[Segment, ...]:
    members: dict[tuple[int, int, str, int], list[int]] = {}
    for index in reversed(range(len(tensors))):
        tensor = tensors[index]
        if tensor.numel:
            key = (KINDS.index(tensor.kind), tensor.cell, tensor.dtype, tensor.group)
            members.setdefault(key, []).append(index)
    segments: list[Segment] = []
    for (kind, cell, dtype, group), indices in sorted(members.items()):
        pieces, at = [], 0
        for index in indices:
            pieces.append(Piece(index, at, at + tensors[index].numel))
            at = pieces[-1].stop
        segments.append(Segment(len(segments), KINDS[kind], dtype, group, tuple(pieces), cell))
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
