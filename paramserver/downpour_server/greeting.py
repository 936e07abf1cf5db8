"""How a worker is greeted: where it is in the job, as far as this shard knows."""

from __future__ import annotations

from collections.abc import Iterable

from downpour_common import messages as m
from downpour_common.messages import Refusal
from downpour_common.transport import Peer
from downpour_server.captures import Captures
from downpour_server.common import Common
from downpour_server.effects import Effect, Reply
from downpour_server.settling import Settling
from downpour_server.store import StoredChunk
from downpour_server.updates import Updates


class Greeting:
    """See the module. ``digest``: of the job's layout."""

    def __init__(
        self, common: Common, shard: int, digest: str, settling: Settling, updates: Updates, captures: Captures
    ) -> None:
        self._shard = shard
        self._digest = digest
        self._gates = common.gates
        self._members = common.members
        self._columns = common.columns
        self._passes = common.passes
        self._trail = common.trail
        self._settling = settling
        self._updates = updates
        self._captures = captures
        self._refusals = common.refusals
        self._numbered = common.numbered

    def greet(self, peer: Peer, hello: m.Hello, shard_epoch: int, effects: list[Effect]) -> None:
        """A member says that it is there; this is the shard in ``shard_epoch``."""
        if hello.digest != self._digest:
            reason = f"worker/{hello.slot} has a model of another layout than the job"
            self._refusals.refuse(peer, hello.request, Refusal.MODEL_DIFFERS, reason, effects)
            return
        self._settling.settle(hello.slot, hello.worker_epoch, hello.done, hello.first)
        if hello.done < 0:
            self._settling.nothing_lost(hello.slot, hello.worker_epoch)
        slot, clock = hello.slot, self._clock_of(hello)
        effects.append(
            Reply(
                peer,
                m.HelloReply(
                    hello.request,
                    self._shard,
                    shard_epoch,
                    clock,
                    () if self._trail is None else self._trail.before(slot, clock),
                    self._next_number(hello, self._columns.buffers(slot)),
                    self._passes.ended.get(slot, ()),
                    any(s.coding is not None and slot in s.coding.residuals for s in self._columns.trainable(slot)),
                ),
            )
        )
        if hello.done >= 0:
            for stored in self._columns.chunks(slot):
                gate = self._gates[stored.chunk.index]
                gate.reached(slot, hello.done)
                self._updates.apply(stored, gate.members_changed())
                self._updates.answer(stored.chunk.index, effects)
            self._captures.finish(effects)

    def _clock_of(self, hello: m.Hello) -> int:
        """Number of the next contribution of a worker to this shard's trainable chunks."""
        chunks, trainable = self._columns.chunks(hello.slot), self._columns.trainable(hello.slot)
        if not self._numbered:
            clocks = (self._gates[stored.chunk.index].clock_of(hello.slot) for stored in chunks)
            return self._members.first_seq + max(clocks, default=0)
        if hello.slot in self._members.ended:  # it waits for the others, wherever they are
            return min((s.version for s in trainable), default=self._members.first_seq)
        return self._next_number(hello, trainable)

    def _next_number(self, hello: m.Hello, chunks: Iterable[StoredChunk]) -> int:
        first, rounds = self._members.first_seq, self._numbered
        windows = [  # a round is named by the version that it changes
            s.window(hello.slot, hello.worker_epoch, s.version if rounds and s.trainable else first) for s in chunks
        ]
        return min((window.next_number for window in windows), default=first)
