"""Fetches that wait for their chunk's gate, and how they are answered."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common import messages as m
from downpour_common.messages import Refusal
from downpour_common.transport import Peer
from downpour_server.attached import AttachedMemory, memory_of
from downpour_server.common import Common
from downpour_server.effects import NOBODY, Effect, Reply, SendWeights
from downpour_server.store import StoredChunk


@dataclass(slots=True)
class Fetch:
    """A fetch that is not answered yet. ``seq`` is -1 for most pulls: they wait for the first weights, and ``version``.

    ``memory``: where the weights are to be brought; None: they are sent.
    """

    peer: Peer
    request: int
    slot: int
    seq: int
    since_s: float
    memory: AttachedMemory | None = None
    version: int = -1
    held: int = 0
    """as :class:`m.Pull` has it"""


class Fetches:
    """The fetches of a shard's chunks."""

    def __init__(self, common: Common) -> None:
        self._chunks = common.chunks
        self._gates = common.gates
        self._members = common.members
        self._columns = common.columns
        self._attached = common.attached
        self._lodging = common.lodging
        self._stats = common.stats
        self._refusals = common.refusals
        self.waiting: dict[int, list[Fetch]] = {}
        """by chunk"""
        self.clear()

    def pull(self, peer: Peer, pull: m.Pull, now_s: float, effects: list[Effect]) -> bool:
        """A worker asks for weights, whether they can be answered now or not; False, with a refusal: not here."""
        stored, memory = self._chunks.get(pull.chunk), memory_of(self._attached, pull)
        if stored is None:
            self._refusals.refuse(peer, pull.request, Refusal.MALFORMED, f"chunk {pull.chunk} is not here", effects)
            return False
        if not stored.trainable or (memory is not None and not memory.in_place):
            memory = None  # which it is too where a replica has several ranks: what they pull is sent
        seq = pull.after if stored.trainable else -1
        fetch = Fetch(peer, pull.request, pull.slot, seq, now_s, memory, pull.version, pull.held)
        self.waiting[pull.chunk].append(fetch)
        return True

    def clear(self) -> None:
        """None waits here any more; nobody is told."""
        self.waiting = {index: [] for index in self._chunks}

    def dismiss(self, slot: int, reason: str, effects: list[Effect]) -> None:
        """Refuse those of the worker that was in ``slot``."""
        for index, fetches in self.waiting.items():
            for fetch in fetches:
                if fetch.slot == slot:
                    self._refusals.refuse(fetch.peer, fetch.request, Refusal.STALE_EPOCH, reason, effects)
            self.waiting[index] = [f for f in fetches if f.slot != slot]

    def overdue(self, now_s: float, timeout_s: float, effects: list[Effect]) -> None:
        """Refuse what has waited for longer than ``timeout_s``, naming whom it waits for."""
        for index, fetches in self.waiting.items():
            overdue = [f for f in fetches if now_s - f.since_s > timeout_s]
            for fetch in overdue:
                fetches.remove(fetch)
                names = ", ".join(f"worker/{s}" for s in self._gates[index].waits_for(fetch.slot, fetch.seq))
                if not self._chunks[index].initialised:
                    names = f"the initial weights of worker/{self._columns.chief_of(self._chunks[index])}"
                elif fetch.version >= 0:
                    names = f"version {fetch.version} of chunk {index}, which is at {self._chunks[index].version}" + (
                        f": {names} must contribute" if names else ""
                    )
                reason = f"after {timeout_s:g} s still waiting for {names}"
                self._refusals.refuse(fetch.peer, fetch.request, Refusal.TIMED_OUT, reason, effects)

    def answer(self, index: int, effects: list[Effect]) -> None:
        """Answer the chunk's fetches that the policy lets go."""
        stored, gate = self._chunks[index], self._gates[index]
        kept = []
        for fetch in self.waiting[index]:
            if not stored.initialised or not (
                fetch.version <= stored.version if fetch.seq < 0 else gate.may_answer(fetch.slot, fetch.seq)
            ):
                kept.append(fetch)
                continue
            if 0 <= fetch.version < stored.version and fetch.slot not in self._members.ended:
                self._answer_previous(stored, fetch, effects)
                continue
            if fetch.seq >= 0 and stored.trainable:
                self._stats.clock_gap_max = max(self._stats.clock_gap_max, gate.clock_gap(fetch.slot, fetch.seq))
            if stored.trainable and self._columns.owns(fetch.slot, stored):
                stored.given_to(fetch.slot)
            if fetch.memory is not None:
                self._stats.bytes_out += stored.nbytes
                self._lodging.answer(stored, fetch.memory)
                effects.append(Reply(fetch.peer, m.WeightsShared(fetch.request, index, stored.version)))
            else:
                effects.append(self._sent(stored, fetch))
        self.waiting[index] = kept

    def _answer_previous(self, stored: StoredChunk, fetch: Fetch, effects: list[Effect]) -> None:
        """Answer a fetch of a version that is over."""
        index = stored.chunk.index
        if fetch.version != stored.previous_version:
            reason = (
                f"chunk {index} is at version {stored.version}, and its weights of version {fetch.version} are gone"
            )
            self._refusals.refuse(fetch.peer, fetch.request, Refusal.STALE_SEQ, reason, effects)
            return
        if fetch.memory is not None:
            self._stats.bytes_out += stored.nbytes
            self._lodging.answer_previous(stored, fetch.memory)
            effects.append(Reply(fetch.peer, m.WeightsShared(fetch.request, index, fetch.version)))
        else:
            effects.append(self._sent(stored, fetch, previous=True))

    def _sent(self, stored: StoredChunk, fetch: Fetch, previous: bool = False) -> Reply | SendWeights:
        """The weights, or the previous ones, as a payload: encoded, if the job's are and the worker wants them so. A
        follower's answers (:data:`NOBODY`) go nowhere, and so are not encoded."""
        coded = None if fetch.peer == NOBODY else stored.answer(fetch.slot, fetch.held, previous)
        if coded is None:
            self._stats.bytes_out += stored.nbytes
            return SendWeights(fetch.peer, fetch.request, stored, previous)
        version, view, base, payload = coded
        self._stats.bytes_out += memoryview(payload).nbytes
        return Reply(fetch.peer, m.WeightsCoded(fetch.request, stored.chunk.index, version, view, base, payload))
