"""Memory that a worker shares with a shard: its gradients, its weights, and whether the shard may keep its own there.

A worker that attaches its memory with ``in_place`` reads its weights only while none of its requests for weights is
open, and gets all of them through that memory. So while nobody else needs them, the shard's weights may *be* the
worker's: chunks *lodge* there, one by one, from an answer to that worker on (:class:`Lodging`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from downpour_common import messages as m
from downpour_common.layout import Chunk, SharedLayout
from downpour_server.members import Members
from downpour_server.store import StoredChunk
from downpour_server.tensors import from_bytes


class AttachedMemory:
    """The memory of one worker. ``in_place``: it was offered for chunks to lodge in."""

    def __init__(self, worker: tuple[int, int], memory: memoryview, layout: SharedLayout, in_place: bool) -> None:
        self.worker = worker
        """slot and epoch"""
        self.in_place = in_place
        self.may_lodge = in_place
        self._memory = memory
        self._layout = layout
        self._weights: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}

    def weights(self, chunk: Chunk) -> torch.Tensor:
        """The worker's weights of a trainable chunk, flat."""
        held = self._weights.get(chunk.index)
        if held is None:
            held = from_bytes(self._memory[self._layout.weights(chunk)], chunk.dtype)
            self._weights[chunk.index] = held
        return held

    def gradient(self, chunk: Chunk) -> torch.Tensor:
        """The worker's gradient of a trainable chunk, flat."""
        held = self._gradients.get(chunk.index)
        if held is None:
            held = from_bytes(self._memory[self._layout.gradient(chunk)], chunk.dtype)
            self._gradients[chunk.index] = held
        return held


def memory_of(attached: Mapping[int, AttachedMemory], message: m.Contribution | m.Pull) -> AttachedMemory | None:
    """The memory that the sender itself has attached, not a worker before it in its slot. ``attached``: by slot."""
    memory = attached.get(message.slot)
    return memory if memory is not None and memory.worker[1] == message.worker_epoch else None


class Lodging:
    """Which chunks lie in the memory of the job's only worker.

    Every chunk that does, does so with the same one, the only member. Whoever changes the members calls :meth:`review`
    before anything else is done.
    """

    def __init__(self, chunks: Iterable[StoredChunk], members: Members) -> None:
        self._chunks = tuple(chunks)
        self._members = members
        self.host: tuple[int, int] | None = None
        """slot and epoch of the worker"""

    def answer(self, stored: StoredChunk, memory: AttachedMemory) -> None:
        """Bring a chunk's weights into the memory of a worker that awaits them, to stay if nobody else needs them."""
        if stored.lodging and self.host == memory.worker:
            return
        target = memory.weights(stored.chunk)
        target.copy_(stored.weights)
        if memory.may_lodge and self._members.sole == memory.worker:
            stored.move_in(target)
            self.host = memory.worker

    def answer_previous(self, stored: StoredChunk, memory: AttachedMemory) -> None:
        """Bring a chunk's weights of the version before into the memory of a worker that awaits them."""
        if self.host == memory.worker:
            self.end()
        memory.weights(stored.chunk).copy_(stored.previous)

    def review(self) -> None:
        """Bring the chunks home unless the worker is still the only one."""
        if self.host is not None and self._members.sole != self.host:
            self.end()

    def end(self) -> None:
        """Bring the chunks home."""
        if self.host is not None:
            self.host = None
            for stored in self._chunks:
                stored.move_out()
