"""Columns: what the same rank of all replicas pushes and pulls, where a replica of the model has several ranks.

A shard holds chunks of all columns. Its members are all ranks of all replicas, and passes end when all have ended them;
but a round of a chunk, its clocks, its first weights and what is known of a worker's way concern the ranks of its
column alone. In a job whose replicas are single workers there is one column, which is everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from downpour_common.layout import Layout, SharedLayout
from downpour_server.members import Awaited, Members
from downpour_server.store import StoredChunk


class ColumnMembers:
    """The members of one column, as its chunks' gates see them: :class:`downpour_server.members.Awaited`."""

    def __init__(self, members: Members, column: int, ranks: int) -> None:
        self._members = members
        self._column = column
        self._ranks = ranks
        self._seen: list[int] = []
        self._awaited: list[int] = []

    @property
    def first_seq(self) -> int:
        """See :class:`Members`."""
        return self._members.first_seq

    def awaited(self) -> list[int]:
        """Those of :meth:`Members.awaited` that are of this column."""
        seen = self._members.awaited()
        if seen is not self._seen:
            self._seen = seen
            self._awaited = [slot for slot in seen if slot % self._ranks == self._column]
        return self._awaited


class Columns:
    """A shard's chunks by column, asked for by the slot of a worker."""

    def __init__(self, layout: Layout, chunks: Mapping[int, StoredChunk], members: Members) -> None:
        self.ranks = layout.model.ranks
        self._members = members
        columns = range(self.ranks)
        views = [ColumnMembers(members, c, self.ranks) if self.ranks > 1 else members for c in columns]
        self._views: list[Awaited] = [*views]
        self._chunks = [[s for s in chunks.values() if s.chunk.cell % self.ranks == c] for c in columns]
        self._trainable = [tuple(s for s in column if s.trainable) for column in self._chunks]
        self._buffers = [tuple(s for s in column if s.chunk.kind == "buffer") for column in self._chunks]
        self._shared = [SharedLayout(layout, column) for column in columns]

    def members_of(self, stored: StoredChunk) -> Awaited:
        """Whose contributions the chunk takes."""
        return self._views[stored.chunk.cell % self.ranks]

    def owns(self, slot: int, stored: StoredChunk) -> bool:
        """Whether the worker in ``slot`` is one of them."""
        return stored.chunk.cell % self.ranks == slot % self.ranks

    def among(self, slots: Collection[int], stored: StoredChunk) -> Collection[int]:
        """Those of ``slots`` that are of the chunk's column."""
        return slots if self.ranks == 1 else [slot for slot in slots if self.owns(slot, stored)]

    def chief_of(self, stored: StoredChunk) -> int:
        """The slot that the chunk's first weights come from: the lowest of its column; -1 where there is none."""
        return min(self.among(self._members.slots, stored), default=-1)

    def chunks(self, slot: int) -> list[StoredChunk]:
        """All of the slot's column."""
        return self._chunks[slot % self.ranks]

    def trainable(self, slot: int) -> tuple[StoredChunk, ...]:
        """The trainable ones of the slot's column."""
        return self._trainable[slot % self.ranks]

    def buffers(self, slot: int) -> tuple[StoredChunk, ...]:
        """The buffers of the slot's column."""
        return self._buffers[slot % self.ranks]

    def shared(self, slot: int) -> SharedLayout:
        """How memory is laid out that this slot's worker shares."""
        return self._shared[slot % self.ranks]
