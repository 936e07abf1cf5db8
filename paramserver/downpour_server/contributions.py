"""Contributions as they come: found, checked, and given to their chunk's gate.

Exactly once: a contribution is checked against the slot's dedup window of its chunk before anything else sees
it. A repeat is never applied again; it is answered from the chunk's present state, under the same rule as the
original. One that is for another shard epoch is refused, or not answered at all.
"""

from __future__ import annotations

import torch

from downpour_common import messages as m
from downpour_common.dtypes import itemsize, pushed_as
from downpour_common.errors import ProtocolError
from downpour_common.messages import Refusal
from downpour_common.transport import Peer
from downpour_server.attached import AttachedMemory, memory_of
from downpour_server.captures import Captures
from downpour_server.common import Common
from downpour_server.contribution import Contribution
from downpour_server.dedup import Seen
from downpour_server.effects import Effect, Reply
from downpour_server.fetches import Fetch, Fetches
from downpour_server.settling import Settling
from downpour_server.staged import StagedPayloads
from downpour_server.store import StoredChunk
from downpour_server.tensors import as_bytes, from_bytes, is_finite
from downpour_server.updates import Updates


class Contributions:
    """See the module. All senders are members. ``skips``: one with NaN or Inf is left out, not refused."""

    def __init__(
        self,
        common: Common,
        shard_epoch: int,
        staged: StagedPayloads,
        settling: Settling,
        fetches: Fetches,
        updates: Updates,
        captures: Captures,
        push_dtype: str,
        skips: bool,
    ) -> None:
        self.shard_epoch = shard_epoch
        self._chunks = common.chunks
        self._gates = common.gates
        self._members = common.members
        self._columns = common.columns
        self._attached = common.attached
        self._lodging = common.lodging
        self._staged = staged
        self._trail = common.trail
        self._settling = settling
        self._fetches = fetches
        self._updates = updates
        self._captures = captures
        self._stats = common.stats
        self._refusals = common.refusals
        self._skips = skips
        self._pushed = {
            i: pushed_as(s.chunk.dtype, push_dtype) if s.trainable else s.chunk.dtype for i, s in common.chunks.items()
        }
        """dtypes of payloads"""
        self._pushed_bytes = {
            i: s.coded_push or s.chunk.numel * itemsize(self._pushed[i]) for i, s in common.chunks.items()
        }

    # ------------------------------------------------------------ where they are

    def take(self, peer: Peer, push: m.Contribution, payload: m.Buffer, now_s: float, effects: list[Effect]) -> None:
        """One that came with its payload."""
        index = push.chunk
        stored = self._refusals.stored(peer, push.request, index, payload, effects, self._pushed_bytes.get(index))
        if stored is None:
            return
        self._staged.drop(push.slot, index)
        try:
            gradient = stored.decoded(payload, push.seq)
        except ProtocolError as error:
            self._refusals.refuse(peer, push.request, Refusal.MALFORMED, f"chunk {index}: {error}", effects)
            return
        if gradient is None:
            gradient = from_bytes(payload, self._pushed[index]).to(stored.weights.dtype)
        self._take(peer, push, stored, gradient, None, now_s, effects)

    def take_shared(self, peer: Peer, push: m.PushPullShared, now_s: float, effects: list[Effect]) -> None:
        """Find the contribution in the worker's memory; it stays there, unchanged, until the answer."""
        stored, memory = self._in_memory(push)
        if stored is None or memory is None:
            reason = f"chunk {push.chunk} is not in memory that worker/{push.slot} shares with this shard"
            self._refusals.refuse(peer, push.request, Refusal.NOT_SHARED, reason, effects)
            return
        if self._accept(peer, push, stored, memory.gradient(stored.chunk), effects):
            fetch = Fetch(peer, push.request, push.slot, push.seq, now_s, memory)
            self._fetches.waiting[push.chunk].append(fetch)
            self._updates.answer(push.chunk, effects)
            self._captures.finish(effects)

    def stage(self, peer: Peer, stage: m.Stage, effects: list[Effect]) -> None:
        """A payload that is sent ahead."""
        index = stage.chunk
        stored = self._refusals.stored(
            peer, stage.request, index, stage.payload, effects, self._pushed_bytes.get(index)
        )
        if stored is None:
            return
        if not stored.trainable or stored.coded_push:
            kind = "encoded" if stored.trainable else stored.chunk.kind
            reason = f"chunk {index} is {kind}: nothing of it is staged"
            self._refusals.refuse(peer, stage.request, Refusal.MALFORMED, reason, effects)
            return
        self._stats.staged += 1
        self._stats.bytes_in += self._pushed_bytes[index]
        effects.append(Reply(peer, m.Staged(stage.request, self._staged.hold(stage, self._pushed[index]))))

    def take_staged(self, peer: Peer, push: m.PushPullStaged, now_s: float, effects: list[Effect]) -> None:
        """Find the contribution among what the worker has sent ahead."""
        stored, held = self._chunks.get(push.chunk), self._staged.take(push)
        if stored is not None and held is not None:
            self._take(peer, push, stored, held.gradient.to(stored.weights.dtype), held.finite, now_s, effects)
        elif stored is not None and self._repeated(push, stored):
            self._take(peer, push, stored, stored.weights, True, now_s, effects)
        else:
            reason = (
                f"contribution {push.seq} of worker/{push.slot} to chunk {push.chunk} is not what was staged, if any"
            )
            self._refusals.refuse(peer, push.request, Refusal.NOT_STAGED, reason, effects)

    def payload_of(self, push: m.PushPullShared | m.PushPullStaged) -> memoryview | None:
        """What a contribution without a payload means; None if it is not here."""
        if isinstance(push, m.PushPullStaged):
            held = self._staged.look(push)
            return None if held is None else as_bytes(held.gradient)
        stored, memory = self._in_memory(push)
        return None if stored is None or memory is None else as_bytes(memory.gradient(stored.chunk))

    def _in_memory(self, push: m.PushPullShared) -> tuple[StoredChunk, AttachedMemory] | tuple[None, None]:
        """The chunk that a contribution is to and the memory that it lies in, if it does."""
        stored, memory = self._chunks.get(push.chunk), memory_of(self._attached, push)
        if stored is None or memory is None or not stored.trainable or not self._columns.owns(push.slot, stored):
            return None, None
        return stored, memory

    def _repeated(self, push: m.Contribution, stored: StoredChunk) -> bool:
        window = stored.window(push.slot, push.worker_epoch, self._members.first_seq)
        return window.look(push.seq) is Seen.REPEAT

    # ------------------------------------------------------------ what becomes of them

    def _take(
        self,
        peer: Peer,
        push: m.Contribution,
        stored: StoredChunk,
        gradient: torch.Tensor,
        finite: bool | None,
        now_s: float,
        effects: list[Effect],
    ) -> None:
        """A contribution that has come as a payload. ``finite``: whether it is; None: not known yet."""
        if stored.trainable and (memory := memory_of(self._attached, push)) is not None:
            # It did not ask for weights in its memory, or will copy what it gets there itself, nobody knows when.
            memory.may_lodge = False
            if self._lodging.host == memory.worker:
                self._lodging.end()
        if not self._accept(peer, push, stored, gradient, effects, finite):
            return
        if isinstance(push, m.Push):
            effects.append(Reply(peer, m.Ack(push.request, stored.version)))
        else:
            held = push.held if isinstance(push, m.PushPullHeld) else 0
            fetch = Fetch(peer, push.request, push.slot, push.seq, now_s, held=held)
            self._fetches.waiting[push.chunk].append(fetch)
        self._updates.answer(push.chunk, effects)
        self._captures.finish(effects)

    def _accept(
        self,
        peer: Peer,
        push: m.Contribution,
        stored: StoredChunk,
        gradient: torch.Tensor,
        effects: list[Effect],
        finite: bool | None = None,
    ) -> bool:
        """Apply a contribution or let it wait for its round, unless it is a repeat; False, with a refusal, if not."""
        if push.shard_epoch < self.shard_epoch:
            self._stats.refused += 1
            return False  # meant for a former process; its worker sends it again once it has heard of this one
        window = stored.window(push.slot, push.worker_epoch, self._members.first_seq)
        seen = window.look(push.seq)
        objection, void = self._objection(push, stored, seen), False
        if objection is None and stored.trainable and seen is Seen.NEW:
            empty = push.samples == 0  # of a step that its worker skipped, whatever the payload
            void = empty or not (is_finite(gradient) if finite is None else finite)
            if void and not (empty or self._skips):
                objection = Refusal.NON_FINITE, "holds NaN or Inf and was not applied"
        if objection is not None:
            code, reason = objection
            reason = f"contribution {push.seq} of worker/{push.slot} {reason}"
            self._refusals.refuse(peer, push.request, code, reason, effects)
            return False
        if window.unsettled:
            window.unsettled = False
            if stored.trainable:
                self._stats.lose(push.slot, push.chunk, window.settle(push.seq))
        if seen is Seen.REPEAT:
            self._stats.repeats += 1
            if self._settling.recovered:  # the checkpoint has the contribution, but not how far its worker was
                self._gates[push.chunk].reached(push.slot, push.seq + 1)
        else:
            window.record(push.seq)
            if stored.coding is not None:
                stored.coding.residuals.pop(push.slot, None)
            if not isinstance(push, m.PushPullStaged):  # whose bytes came before
                self._stats.bytes_in += self._pushed_bytes[stored.chunk.index]
            contribution = Contribution(
                push.slot, push.seq, push.samples, push.base_version, push.hyper, gradient, push.position, void
            )
            if void and push.samples:
                self._stats.count_void(push.slot, push.seq)
            if self._trail is not None and stored.trainable:
                self._trail.note(push.slot, push.seq, push.position)
            self._updates.apply(stored, self._gates[push.chunk].offer(contribution))
        return True

    def _objection(self, push: m.Contribution, stored: StoredChunk, seen: Seen) -> tuple[Refusal, str] | None:
        """Why a contribution must not be applied; a refused one leaves no trace, so it may come again, repaired."""
        epoch = self.shard_epoch
        if push.shard_epoch != epoch:
            return Refusal.STALE_EPOCH, f"is meant for epoch {push.shard_epoch} of this shard, not {epoch}"
        if push.seq < 0 or push.samples < 0 or stored.chunk.kind == "frozen":
            return Refusal.MALFORMED, f"to {stored.chunk.kind} chunk {push.chunk} makes no sense"
        if not self._columns.owns(push.slot, stored):
            return (
                Refusal.MALFORMED,
                f"to chunk {push.chunk}, which another rank of each replica pushes, makes no sense",
            )
        if seen is Seen.TOO_OLD:
            return Refusal.STALE_SEQ, "is older than the window of repeats"
        if seen is Seen.REPEAT:
            return None
        if not stored.initialised:
            return Refusal.NOT_READY, f"is early: chunk {push.chunk} has no weights yet; pull before the first push"
        if not stored.understands(push.hyper):
            return Refusal.MALFORMED, "has options that the update rule cannot take"
        return None
