"""Epochs at a shard: workers end theirs, and the next begins once all have; and what else a change of those who are
waited for lets go."""

from __future__ import annotations

from collections.abc import Collection

from downpour_common import messages as m
from downpour_common.transport import Peer
from downpour_server.captures import Captures
from downpour_server.common import Common
from downpour_server.effects import Effect, Reply
from downpour_server.endings import Ending, Endings
from downpour_server.store import StoredChunk
from downpour_server.updates import Updates


class Epochs:
    """See the module."""

    def __init__(self, common: Common, endings: Endings, updates: Updates, captures: Captures) -> None:
        self._chunks = common.chunks
        self._trainable = common.trainable
        self._gates = common.gates
        self._members = common.members
        self._columns = common.columns
        self._passes = common.passes
        self._trail = common.trail
        self._endings = endings
        self._updates = updates
        self._captures = captures
        self._numbered = common.numbered

    def end(self, peer: Peer, message: m.EndEpoch, now_s: float, effects: list[Effect]) -> None:
        """A worker has no more in its epoch."""
        which = (message.loader, message.epoch)
        if self._passes.is_over(which):
            effects.append(Reply(peer, m.Ack(message.request, self._round(self._columns.trainable(message.slot)))))
            return
        self._endings.waiting.append(Ending(peer, message.request, message.slot, now_s))
        self._passes.end(message.slot, which)
        self._members.end_epoch(message.slot)
        self.members_changed(effects)

    def members_changed(self, effects: list[Effect]) -> None:
        """Others are waited for than before."""
        for index, gate in self._gates.items():
            self._updates.apply(self._chunks[index], gate.members_changed())
            self._updates.answer(index, effects)
        if self._members.turn_over():
            if self._passes.turn_over() and self._numbered:
                self._number_from(self._round(self._trainable))
            # the same for the ranks of all columns, as the numbers of rounds are
            self._endings.answer(self._round(self._trainable), effects)
        self._captures.finish(effects)

    def _round(self, chunks: Collection[StoredChunk]) -> int:
        """The round that the next contributions to these are meant for; 0 where they are not numbered so."""
        return max((s.version for s in chunks), default=0) if self._numbered else 0

    def _number_from(self, round_: int) -> None:
        """The next contributions of all are meant for this round: who had no part in the last ones skips numbers."""
        for stored in self._trainable:
            self._gates[stored.chunk.index].epoch_over()
            stored.number_from_version(round_)
            self._updates.unaligned.add(stored.chunk.index)
        if self._trail is not None:
            self._trail.begin_at(round_)
