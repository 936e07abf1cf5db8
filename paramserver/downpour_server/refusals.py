"""Requests that a shard does not take: refused in words, and counted."""

from __future__ import annotations

from collections.abc import Mapping

from downpour_common import messages as m
from downpour_common.messages import Refusal
from downpour_common.transport import Peer
from downpour_server.effects import Effect, Reply
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk


class Refusals:
    """See the module."""

    def __init__(self, chunks: Mapping[int, StoredChunk], stats: ShardStats) -> None:
        self._chunks = chunks
        self._stats = stats

    def refuse(self, peer: Peer, request: int, code: Refusal, reason: str, effects: list[Effect]) -> None:
        """Say why."""
        self._stats.refused += 1
        effects.append(Reply(peer, m.Refused(request, code.value, reason)))

    def stored(
        self,
        peer: Peer,
        request: int,
        chunk: int,
        payload: m.Buffer,
        effects: list[Effect],
        nbytes: int | None = None,
    ) -> StoredChunk | None:
        """The chunk of a payload, which has its size, or ``nbytes``; None, and refused, if it has not."""
        stored = self._chunks.get(chunk)
        size = memoryview(payload).nbytes
        if stored is None:
            self.refuse(peer, request, Refusal.MALFORMED, f"chunk {chunk} is not here", effects)
        elif size != (expected := stored.nbytes if nbytes is None else nbytes):
            reason = f"chunk {chunk} has {expected} bytes, the payload {size}"
            self.refuse(peer, request, Refusal.MALFORMED, reason, effects)
            return None
        return stored
