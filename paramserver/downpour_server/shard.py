"""The shard as a state machine: messages in, effects out. No sockets, no clock, no files.

``handle`` is the only method that changes state. Time comes in with each event and is only compared with
itself, so safety never depends on a wall clock.

Exactly once: a contribution is checked against the slot's dedup window of its chunk before anything else sees
it. A repeat is never applied again; it is answered from the chunk's present state, under the same rule as the
original. A contribution of a worker that is not a member, or has been replaced, or for another shard epoch, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from downpour_common import messages as m
from downpour_common.compensation import SPARE_BASES, CompensationSpec
from downpour_common.compression import NO_COMPRESSION, Compression
from downpour_common.dtypes import itemsize, pushed_as
from downpour_common.errors import ProtocolError
from downpour_common.layout import Layout, SharedLayout
from downpour_common.messages import Message, Refusal
from downpour_common.modes import Mode
from downpour_common.transport import Peer
from downpour_server import residuals
from downpour_server.attached import AttachedMemory, Lodging
from downpour_server.coding import coding_for
from downpour_server.columns import Columns
from downpour_server.contribution import Contribution
from downpour_server.dedup import Seen
from downpour_server.effects import Attach, Effect, Reply, SendWeights
from downpour_server.members import Members
from downpour_server.noise import NoiseMeter
from downpour_server.passes import Passes, Trail
from downpour_server.policy import Gate, gate_for
from downpour_server.policy.stale import StaleGate
from downpour_server.snapshot import Capture
from downpour_server.staged import StagedPayloads
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk
from downpour_server.tensors import Scratch, as_bytes, from_bytes, is_finite
from downpour_server.vectors import Vectors, take_portion


@dataclass(frozen=True, slots=True)
class Identity:
    """Which shard of which job this is."""

    job: str
    shard: int
    shard_epoch: int


FromWorker = (
    m.Hello
    | m.Init
    | m.Contribution
    | m.Pull
    | m.EndEpoch
    | m.Leave
    | m.AttachMemory
    | m.Stage
    | m.Residual
    | m.FetchResidual
)
"""What a worker sends, which says who it is."""


NOBODY = b""
"""Who has sent what a follower takes."""


@dataclass(slots=True)
class _Ending:
    """An EndEpoch that is not answered yet."""

    peer: Peer
    request: int
    slot: int
    since_s: float


@dataclass(slots=True)
class _Fetch:
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


class Shard:
    """State of one shard; see the module.

    ``keep_previous``, ``skip_non_finite``, ``bases``, ``warm_start``: see :class:`downpour_server.config.ShardConfig`.
    Raises :class:`ConfigError` for a ``compensation`` that the update rule cannot have.
    """

    def __init__(
        self,
        identity: Identity,
        layout: Layout,
        mode: Mode,
        workers: int,
        timeout_s: float,
        push_dtype: str = "same",
        keep_previous: bool = False,
        skip_non_finite: bool = False,
        measure_noise: bool = False,
        compensation: CompensationSpec | None = None,
        bases: int = SPARE_BASES,
        warm_start: int = 0,
        compression: Compression = NO_COMPRESSION,
    ) -> None:
        self.identity = identity
        self.layout = layout
        self.stats = ShardStats()
        self.noise = NoiseMeter(measure_noise)
        keep_previous = keep_previous and mode.synchronous
        scratch, rule, options = Scratch(), layout.model.rule, layout.model.options
        self.chunks = {
            c.index: StoredChunk(
                c, rule, options[c.group] if c.group >= 0 else {}, scratch, keep_previous, compensation, bases
            )
            for c in layout.of_shard(identity.shard)
        }
        for stored in self.chunks.values():
            stored.coding = coding_for(stored.chunk, compression, mode.synchronous)
        self._trainable = tuple(stored for stored in self.chunks.values() if stored.trainable)
        self._pushed = {
            i: pushed_as(s.chunk.dtype, push_dtype) if s.trainable else s.chunk.dtype for i, s in self.chunks.items()
        }
        """dtypes of payloads"""
        self._pushed_bytes = {
            i: s.coded_push or s.chunk.numel * itemsize(self._pushed[i]) for i, s in self.chunks.items()
        }
        self._mode = mode
        self._timeout_s = timeout_s
        self._members = Members(workers, take_over=mode.synchronous)
        self._columns = Columns(layout, self.chunks, self._members)
        self._gates: dict[int, Gate] = {}
        for index, stored in self.chunks.items():
            group = stored.chunk.group if stored.trainable else -1
            gate = gate_for(mode, group, self._columns.members_of(stored), stored, self._count_late)
            if warm_start and isinstance(gate, StaleGate):
                gate.let_lead(self._columns.ranks, warm_start)
            self._gates[index] = gate
        self._fetches: dict[int, list[_Fetch]] = {index: [] for index in self.chunks}
        self._ending: list[_Ending] = []
        self._attached: dict[int, AttachedMemory] = {}
        """by slot"""
        self._lodging = Lodging(self.chunks.values(), self._members)
        self._staged = StagedPayloads()
        self._capture: Capture | None = None
        self._position: tuple[int, ...] = ()
        self._stays_home = False
        self._skips = skip_non_finite
        self._recovered = False
        self._passes = Passes()
        self._trail = Trail() if keep_previous else None
        self._unaligned: set[int] = set()
        """chunks whose next round says which one it is: a worker that was lost may have torn the last one of a pass"""
        self._last_void: dict[int, int] = {}
        self._last_late: dict[int, int] = {}
        self.vectors = Vectors(self._trainable) if mode.name == "lbfgs" else None

    def start_from(self, clock: int) -> None:
        """The first sequence number of every worker, when the job goes on from a checkpoint.

        In the synchronous mode a version is a clock, whatever the checkpoint's mode counted.
        """
        self._members.first_seq = clock
        if self._mode.synchronous:
            for stored in self.chunks.values():
                stored.version = clock

    def recovered(self, first_seq: int) -> None:
        """The chunks are those of a former process of this shard, at some moment; the job has gone on since.

        ``first_seq``: number of the first contribution of those who were there at the job's start.
        """
        self._members.first_seq = first_seq
        self._recovered = True
        for stored in self._trainable:
            stored.forget_views(self.identity.shard_epoch)

    def handle(self, peer: Peer, message: Message, now_s: float) -> list[Effect]:
        """Take one message from a worker; returns what is to be done, in order."""
        effects: list[Effect] = []
        match message:
            case m.PushPull() | m.Push() | m.PushPullHeld():
                self._contribute(peer, message, message.payload, now_s, effects)
            case m.PushPullShared():
                self._contribute_shared(peer, message, now_s, effects)
            case m.Stage():
                if self._admits(peer, message, effects):
                    self._stage(peer, message, effects)
            case m.PushPullStaged():
                if self._admits(peer, message, effects):
                    self._contribute_staged(peer, message, now_s, effects)
            case m.Pull():
                if self._admits(peer, message, effects):
                    self._fetch(peer, message, now_s, effects)
            case m.PushPortion():
                if self._admits(peer, message, effects):
                    stored = self._stored(peer, message.request, message.chunk, message.payload, effects)
                    if stored is not None and message.shard_epoch >= self.identity.shard_epoch:
                        effects.append(Reply(peer, take_portion(self.vectors, stored, message, self.stats)))
            case m.AttachMemory():
                if self._admits(peer, message, effects):
                    effects.append(Attach(peer, message))
            case m.Hello():
                self._hello(peer, message, effects)
            case m.Residual():
                if self._admits(peer, message, effects):
                    self._keep_residual(peer, message, effects)
            case m.FetchResidual():
                if self._admits(peer, message, effects):
                    effects.append(Reply(peer, residuals.give(message, self.chunks.get(message.chunk))))
            case m.Init():
                if self._admits(peer, message, effects):
                    self._initialise(peer, message, effects)
            case m.EndEpoch():
                if self._admits(peer, message, effects):
                    self._end_epoch(peer, message, now_s, effects)
            case m.Leave():
                if self._admits(peer, message, effects):
                    effects.append(Reply(peer, m.Ack(message.request, 0)))
                    self._settle(message.slot, message.worker_epoch, message.done)
                    self._members.leave(message.slot)
                    self._not_computing(message.slot)
                    self._staged.drop(message.slot)
                    self._owes_nothing(message.slot)
                    self._lodging.review()
                    self._members_changed(effects)
            case _:
                raise ProtocolError(f"a shard does not take {type(message).__name__}")
        return effects

    @property
    def initialised(self) -> bool:
        """Whether every chunk has weights."""
        return all(stored.initialised for stored in self.chunks.values())

    @property
    def members_version(self) -> int:
        """Version of the members in force; 0: those of the start."""
        return self._members.version

    def take_members(self, message: m.SetMembers) -> list[Effect]:
        """:meth:`set_members` as the coordinator says it. Raises :class:`ProtocolError`."""
        slots, left = message.slots, message.left
        if len(slots) % 2 or len(left) % 4 or min((*slots, *left), default=0) < 0:
            raise ProtocolError("a list of members has pairs of counts")
        epochs = dict(zip(slots[::2], slots[1::2], strict=True))
        leavers = zip(left[::4], left[1::4], left[2::4], left[3::4], strict=True)
        return self.set_members(message.version, epochs, message.takes_over, leavers)

    def set_members(
        self,
        version: int,
        epochs: Mapping[int, int],
        takes_over: Collection[int] = (),
        left: Iterable[tuple[int, int, int, int]] = (),
    ) -> list[Effect]:
        """The job's workers are these from now on, by slot; an older ``version`` changes nothing. ``takes_over``: see
        :meth:`downpour_server.members.Members.replace`. ``left``: (slot, epoch, first, done) of workers that have
        left, whose last word a former process of this shard may have had.

        Whatever waited only for one that is no longer a member goes on. Where another process takes over, all that the
        former one has sent stays, and counts as the new one's.
        """
        effects: list[Effect] = []
        for slot, epoch, first, done in sorted(left):
            self._settle(slot, epoch, done, first)
        change = self._members.replace(version, epochs, takes_over)
        if change is None:
            return effects
        self._lodging.review()
        for slot in change.over | change.taken_over:
            self._dismiss(slot, effects)
        for index, gate in self._gates.items():
            gate.joined(self._columns.among(change.joined, self.chunks[index]))
            for slot in change.lost | change.joined:
                self.chunks[index].forget(slot)
            for slot in change.taken_over:
                self.chunks[index].take_over(slot, epochs[slot])
        for slot in change.over | change.joined:
            self._not_computing(slot)
            self._passes.forget(slot)
            if self._trail is not None:
                self._trail.forget(slot)
        self._members_changed(effects)
        return effects

    def shared_layout(self, slot: int) -> SharedLayout:
        """How the memory is laid out that this slot's worker shares."""
        return self._columns.shared(slot)

    def attached(self, attach: Attach, memory: memoryview | None) -> list[Effect]:
        """The memory of :class:`Attach` is mapped, or cannot be."""
        offer = attach.offer
        effects: list[Effect] = []
        if memory is None:
            reason = f"the memory of worker/{offer.slot} cannot be shared with server/{self.identity.shard}"
            self._refuse(attach.peer, offer.request, Refusal.NOT_SHARED, reason, effects)
        else:
            if self._lodging.host is not None and self._lodging.host[0] == offer.slot:
                self._lodging.end()
            worker = (offer.slot, offer.worker_epoch)
            in_place = offer.in_place and self._columns.ranks == 1
            layout = self.shared_layout(offer.slot)
            self._attached[offer.slot] = AttachedMemory(worker, memory, layout, in_place)
            if self._stays_home:
                self._attached[offer.slot].may_lodge = False
            effects.append(Reply(attach.peer, m.Ack(offer.request, 0)))
        return effects

    def tick(self, now_s: float) -> list[Effect]:
        """Refuse what has waited for longer than the deadline, naming whom it waits for."""
        effects: list[Effect] = []
        for index, fetches in self._fetches.items():
            overdue = [f for f in fetches if now_s - f.since_s > self._timeout_s]
            for fetch in overdue:
                fetches.remove(fetch)
                names = ", ".join(f"worker/{s}" for s in self._gates[index].waits_for(fetch.slot, fetch.seq))
                if not self.chunks[index].initialised:
                    names = f"the initial weights of worker/{self._columns.chief_of(self.chunks[index])}"
                elif fetch.version >= 0:
                    names = f"version {fetch.version} of chunk {index}, which is at {self.chunks[index].version}" + (
                        f": {names} must contribute" if names else ""
                    )
                reason = f"after {self._timeout_s:g} s still waiting for {names}"
                self._refuse(fetch.peer, fetch.request, Refusal.TIMED_OUT, reason, effects)
        late = [entry for entry in self._ending if now_s - entry.since_s > self._timeout_s]
        for entry in late:
            self._ending.remove(entry)
            names = ", ".join(f"worker/{slot}" for slot in self._members.awaited())
            reason = f"after {self._timeout_s:g} s still waiting for {names} to end the epoch"
            self._refuse(entry.peer, entry.request, Refusal.TIMED_OUT, reason, effects)
        return effects

    def snapshot(self, snapshot: int, folder: str, at_clock: int) -> list[Effect]:
        """Begin a snapshot; see :class:`downpour_server.snapshot.Capture`."""
        effects: list[Effect] = []
        if self._capture is not None:
            effects.append(self._capture.failed("another snapshot began before it was complete"))
        capture = Capture(snapshot, folder, at_clock, self.identity.shard, self.chunks, self._waiting)
        if not self.initialised:
            return [*effects, capture.failed("the first weights are not there yet")]
        self._capture = capture
        for stored in self.chunks.values():
            self._capture.look(stored, self._position, begins=self._mode.synchronous)
        self._finish_capture(effects)
        return effects

    def _waiting(self, stored: StoredChunk) -> Collection[tuple[int, int]]:
        """Slot and number of what has come to the chunk and is not in its weights yet."""
        return self._gates[stored.chunk.index].waiting()

    # ------------------------------------------------------------ replication, see downpour_server.replica

    def stay_home(self) -> None:
        """From now on no weights lie in a worker's memory."""
        self._stays_home = True
        self._lodging.end()
        for memory in self._attached.values():
            memory.may_lodge = False

    def lead(self, term: int) -> None:
        """Serve in this term. The requests that another one has not answered are not this one's."""
        self.identity = replace(self.identity, shard_epoch=term)
        self._fetches = {index: [] for index in self.chunks}
        self._ending.clear()
        for stored in self._trainable:
            stored.forget_views(term)  # whatever the leader before has sent

    def knows(self, message: FromWorker) -> bool:
        """Whether the message, for who its sender is alone, changes nothing here."""
        return message.job != self.identity.job or self._members.knows(message.slot, message.worker_epoch)

    @property
    def keeps_bases(self) -> bool:
        """Whether it matters what workers have fetched."""
        return any(stored.bases is not None for stored in self._trainable)

    def payload_of(self, push: m.PushPullShared | m.PushPullStaged) -> memoryview | None:
        """What a contribution without a payload means; None if it is not here."""
        if isinstance(push, m.PushPullStaged):
            held = self._staged.look(push)
            return None if held is None else as_bytes(held.gradient)
        stored, memory = self._in_memory(push)
        return None if stored is None or memory is None else as_bytes(memory.gradient(stored.chunk))

    # ------------------------------------------------------------ contributions

    def _contribute_shared(self, peer: Peer, push: m.PushPullShared, now_s: float, effects: list[Effect]) -> None:
        """Find the contribution in the worker's memory; it stays there, unchanged, until the answer."""
        if not self._admits(peer, push, effects):
            return
        stored, memory = self._in_memory(push)
        if stored is None or memory is None:
            reason = f"chunk {push.chunk} is not in memory that worker/{push.slot} shares with this shard"
            self._refuse(peer, push.request, Refusal.NOT_SHARED, reason, effects)
            return
        if self._accept(peer, push, stored, memory.gradient(stored.chunk), effects):
            self._fetches[push.chunk].append(_Fetch(peer, push.request, push.slot, push.seq, now_s, memory))
            self._answer(push.chunk, effects)
            self._finish_capture(effects)

    def _contribute(
        self, peer: Peer, push: m.Contribution, payload: m.Buffer, now_s: float, effects: list[Effect]
    ) -> None:
        if not self._admits(peer, push, effects):
            return
        stored = self._pushed_to(peer, push.request, push.chunk, payload, effects)
        if stored is None:
            return
        self._staged.drop(push.slot, push.chunk)
        try:
            gradient = stored.decoded(payload, push.seq)
        except ProtocolError as error:
            self._refuse(peer, push.request, Refusal.MALFORMED, f"chunk {push.chunk}: {error}", effects)
            return
        if gradient is None:
            gradient = from_bytes(payload, self._pushed[push.chunk]).to(stored.weights.dtype)
        self._take(peer, push, stored, gradient, None, now_s, effects)

    def _stage(self, peer: Peer, stage: m.Stage, effects: list[Effect]) -> None:
        stored = self._pushed_to(peer, stage.request, stage.chunk, stage.payload, effects)
        if stored is None:
            return
        if not stored.trainable or stored.coded_push:
            kind = "encoded" if stored.trainable else stored.chunk.kind
            reason = f"chunk {stage.chunk} is {kind}: nothing of it is staged"
            self._refuse(peer, stage.request, Refusal.MALFORMED, reason, effects)
            return
        self.stats.staged += 1
        self.stats.bytes_in += self._pushed_bytes[stored.chunk.index]
        effects.append(Reply(peer, m.Staged(stage.request, self._staged.hold(stage, self._pushed[stage.chunk]))))

    def _contribute_staged(self, peer: Peer, push: m.PushPullStaged, now_s: float, effects: list[Effect]) -> None:
        """Find the contribution among what the worker has sent ahead."""
        stored, held = self.chunks.get(push.chunk), self._staged.take(push)
        if stored is not None and held is not None:
            self._take(peer, push, stored, held.gradient.to(stored.weights.dtype), held.finite, now_s, effects)
        elif stored is not None and self._repeated(push, stored):
            self._take(peer, push, stored, stored.weights, True, now_s, effects)
        else:
            reason = (
                f"contribution {push.seq} of worker/{push.slot} to chunk {push.chunk} is not what was staged, if any"
            )
            self._refuse(peer, push.request, Refusal.NOT_STAGED, reason, effects)

    def _repeated(self, push: m.Contribution, stored: StoredChunk) -> bool:
        window = stored.window(push.slot, push.worker_epoch, self._members.first_seq)
        return window.look(push.seq) is Seen.REPEAT

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
        if stored.trainable and (memory := self._memory_of(push)) is not None:
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
            self._fetches[push.chunk].append(_Fetch(peer, push.request, push.slot, push.seq, now_s, held=held))
        self._answer(push.chunk, effects)
        self._finish_capture(effects)

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
        if push.shard_epoch < self.identity.shard_epoch:
            self.stats.refused += 1
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
            self._refuse(peer, push.request, code, reason, effects)
            return False
        if window.unsettled:
            window.unsettled = False
            if stored.trainable:
                self.stats.lose(push.slot, push.chunk, window.settle(push.seq))
        if seen is Seen.REPEAT:
            self.stats.repeats += 1
            if self._recovered:  # the checkpoint has the contribution, but not how far its worker was
                self._gates[push.chunk].reached(push.slot, push.seq + 1)
        else:
            window.record(push.seq)
            if stored.coding is not None:
                stored.coding.residuals.pop(push.slot, None)
            if not isinstance(push, m.PushPullStaged):  # whose bytes came before
                self.stats.bytes_in += self._pushed_bytes[stored.chunk.index]
            contribution = Contribution(
                push.slot, push.seq, push.samples, push.base_version, push.hyper, gradient, push.position, void
            )
            if void and push.samples:
                self._count_void(contribution)
            if self._trail is not None and stored.trainable:
                self._trail.note(push.slot, push.seq, push.position)
            self._apply(stored, self._gates[push.chunk].offer(contribution))
        return True

    def _count_late(self, contribution: Contribution) -> None:
        """It came after its round; counted as :meth:`_count_void` does."""
        if self._last_late.get(contribution.slot) != contribution.seq:
            self._last_late[contribution.slot] = contribution.seq
            self.stats.late[contribution.slot] += 1

    def _count_void(self, contribution: Contribution) -> None:
        """Once for all chunks here, which get the same number one after the other."""
        if self._last_void.get(contribution.slot) != contribution.seq:
            self._last_void[contribution.slot] = contribution.seq
            self.stats.non_finite[contribution.slot] += 1

    def _objection(self, push: m.Contribution, stored: StoredChunk, seen: Seen) -> tuple[Refusal, str] | None:
        """Why a contribution must not be applied; a refused one leaves no trace, so it may come again, repaired."""
        epoch = self.identity.shard_epoch
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

    def _in_memory(self, push: m.PushPullShared) -> tuple[StoredChunk, AttachedMemory] | tuple[None, None]:
        """The chunk that a contribution is to and the memory that it lies in, if it does."""
        stored, memory = self.chunks.get(push.chunk), self._memory_of(push)
        if stored is None or memory is None or not stored.trainable or not self._columns.owns(push.slot, stored):
            return None, None
        return stored, memory

    def _memory_of(self, message: m.Contribution | m.Pull) -> AttachedMemory | None:
        """The memory that the sender itself has attached, not a worker before it in its slot."""
        memory = self._attached.get(message.slot)
        return memory if memory is not None and memory.worker[1] == message.worker_epoch else None

    def _apply(self, stored: StoredChunk, rounds: Iterable[list[Contribution]]) -> None:
        for round_ in rounds:
            if self._unaligned and stored.chunk.index in self._unaligned:
                self._unaligned.remove(stored.chunk.index)
                stored.version = max(stored.version, *(c.seq for c in round_))
            counted = [c for c in round_ if not c.void]
            if stored.trainable:
                for contribution in counted:
                    self.stats.apply(contribution.slot, max(0, stored.version - contribution.base_version))
                    self.stats.uncompensated += not stored.compensates(contribution)
                self.stats.updates += 1
                self.noise.look(stored.chunk.index, stored.version, counted)
            if stored.coding is not None:
                stored.coding.begin(stored.weights)
            stored.apply(counted)
            if stored.coding is not None:
                stored.coding.advance(stored.weights)
            self._position = max(self._position, *(c.position for c in round_))
            if stored.trainable:
                self.stats.round = max(self.stats.round, stored.version)
            if self._capture is not None:
                self._capture.look(stored, self._position)

    def _answer(self, index: int, effects: list[Effect]) -> None:
        """Answer the chunk's fetches that the policy lets go."""
        stored, gate = self.chunks[index], self._gates[index]
        if self._capture is not None and stored.coded_push:
            self._ask_residuals(stored, self._capture, effects)
        kept = []
        for fetch in self._fetches[index]:
            if not stored.initialised or not (
                fetch.version <= stored.version if fetch.seq < 0 else gate.may_answer(fetch.slot, fetch.seq)
            ):
                kept.append(fetch)
                continue
            if 0 <= fetch.version < stored.version and fetch.slot not in self._members.ended:
                self._answer_previous(stored, fetch, effects)
                continue
            if fetch.seq >= 0 and stored.trainable:
                self.stats.clock_gap_max = max(self.stats.clock_gap_max, gate.clock_gap(fetch.slot, fetch.seq))
            if stored.trainable and self._columns.owns(fetch.slot, stored):
                stored.given_to(fetch.slot)
            if fetch.memory is not None:
                self.stats.bytes_out += stored.nbytes
                self._lodging.answer(stored, fetch.memory)
                effects.append(Reply(fetch.peer, m.WeightsShared(fetch.request, index, stored.version)))
            else:
                effects.append(self._sent(stored, fetch))
        self._fetches[index] = kept

    def _sent(self, stored: StoredChunk, fetch: _Fetch, previous: bool = False) -> Reply | SendWeights:
        """The weights, or the previous ones, as a payload: encoded, if the job's are and the worker wants them so. A
        follower's answers (:data:`NOBODY`) go nowhere, and so are not encoded."""
        coded = None if fetch.peer == NOBODY else stored.answer(fetch.slot, fetch.held, previous)
        if coded is None:
            self.stats.bytes_out += stored.nbytes
            return SendWeights(fetch.peer, fetch.request, stored, previous)
        version, view, base, payload = coded
        self.stats.bytes_out += memoryview(payload).nbytes
        return Reply(fetch.peer, m.WeightsCoded(fetch.request, stored.chunk.index, version, view, base, payload))

    def _ask_residuals(self, stored: StoredChunk, capture: Capture, effects: list[Effect]) -> None:
        """See :mod:`downpour_server.residuals`."""
        peers = {f.slot: f.peer for f in self._fetches[stored.chunk.index] if f.seq == capture.at_clock - 1}
        peers.update({e.slot: e.peer for e in self._ending if self._columns.owns(e.slot, stored)})
        effects += residuals.ask(self.identity.job, stored, capture, peers)

    def _keep_residual(self, peer: Peer, message: m.Residual, effects: list[Effect]) -> None:
        stored = self._stored(peer, message.request, message.chunk, message.payload, effects)
        if stored is not None:
            residuals.keep(message, stored, self._capture)
            effects.append(Reply(peer, m.Ack(message.request, stored.version)))
            self._finish_capture(effects)

    def _owes_nothing(self, slot: int) -> None:
        """Nothing more is heard of the worker in ``slot``."""
        if self._capture is not None:
            self._capture.release(slot)

    def _answer_previous(self, stored: StoredChunk, fetch: _Fetch, effects: list[Effect]) -> None:
        """Answer a fetch of a version that is over."""
        index = stored.chunk.index
        if fetch.version != stored.previous_version:
            reason = (
                f"chunk {index} is at version {stored.version}, and its weights of version {fetch.version} are gone"
            )
            self._refuse(fetch.peer, fetch.request, Refusal.STALE_SEQ, reason, effects)
            return
        if fetch.memory is not None:
            self.stats.bytes_out += stored.nbytes
            self._lodging.answer_previous(stored, fetch.memory)
            effects.append(Reply(fetch.peer, m.WeightsShared(fetch.request, index, fetch.version)))
        else:
            effects.append(self._sent(stored, fetch, previous=True))

    def _end_epoch(self, peer: Peer, message: m.EndEpoch, now_s: float, effects: list[Effect]) -> None:
        which = (message.loader, message.epoch)
        if self._passes.is_over(which):
            effects.append(Reply(peer, m.Ack(message.request, self._round(self._columns.trainable(message.slot)))))
            return
        self._ending.append(_Ending(peer, message.request, message.slot, now_s))
        self._passes.end(message.slot, which)
        self._members.end_epoch(message.slot)
        self._members_changed(effects)

    def _round(self, chunks: Iterable[StoredChunk]) -> int:
        """The round that the next contributions to these are meant for; 0 where they are not numbered so."""
        return max((s.version for s in chunks), default=0) if self._mode.synchronous else 0

    def _members_changed(self, effects: list[Effect]) -> None:
        for index, gate in self._gates.items():
            self._apply(self.chunks[index], gate.members_changed())
            self._answer(index, effects)
        if self._members.turn_over():
            if self._passes.turn_over() and self._mode.synchronous:
                self._number_from(self._round(self._trainable))
            round_ = self._round(self._trainable)  # the same for the ranks of all columns, as the numbers of rounds are
            effects.extend(Reply(entry.peer, m.Ack(entry.request, round_)) for entry in self._ending)
            self._ending.clear()
        self._finish_capture(effects)

    def _number_from(self, round_: int) -> None:
        """The next contributions of all are meant for this round: who had no part in the last ones skips numbers."""
        for stored in self._trainable:
            self._gates[stored.chunk.index].epoch_over()
            stored.number_from_version(round_)
            self._unaligned.add(stored.chunk.index)
        if self._trail is not None:
            self._trail.begin_at(round_)

    def _not_computing(self, slot: int) -> None:
        """Whoever was in ``slot`` contributes nothing more."""
        for stored in self._trainable:
            stored.left_by(slot)

    def _dismiss(self, slot: int, effects: list[Effect]) -> None:
        """The worker that was in ``slot`` is not a member any more: none of its requests waits here."""
        if slot in self._attached:  # where it may write once it has been told
            for gate in self._gates.values():
                gate.own(slot)
        reason = f"worker/{slot} is no longer a member of the job, or has been replaced"
        waiting: list[_Fetch | _Ending] = [entry for entry in self._ending if entry.slot == slot]
        self._ending = [entry for entry in self._ending if entry.slot != slot]
        for index, fetches in self._fetches.items():
            waiting += [f for f in fetches if f.slot == slot]
            self._fetches[index] = [f for f in fetches if f.slot != slot]
        for entry in waiting:
            self._refuse(entry.peer, entry.request, Refusal.STALE_EPOCH, reason, effects)
        self._attached.pop(slot, None)
        self._staged.drop(slot)
        self._owes_nothing(slot)

    def _finish_capture(self, effects: list[Effect]) -> None:
        if self._capture is not None and (written := self._capture.effect()) is not None:
            self._capture = None
            if not written.error:
                written.document.update(self.stats.losses())
            effects.append(written)

    # ------------------------------------------------------------ everything else

    def _hello(self, peer: Peer, hello: m.Hello, effects: list[Effect]) -> None:
        if not self._admits(peer, hello, effects):
            return
        if hello.digest != self.layout.digest:
            reason = f"worker/{hello.slot} has a model of another layout than the job"
            self._refuse(peer, hello.request, Refusal.MODEL_DIFFERS, reason, effects)
            return
        self._settle(hello.slot, hello.worker_epoch, hello.done, hello.first)
        if self._recovered and hello.done < 0:  # it begins here and now, so nothing of it was lost
            for stored in self._columns.trainable(hello.slot):
                stored.window(hello.slot, hello.worker_epoch, self._members.first_seq).unsettled = False
        slot, clock = hello.slot, self._clock_of(hello)
        effects.append(
            Reply(
                peer,
                m.HelloReply(
                    hello.request,
                    self.identity.shard,
                    self.identity.shard_epoch,
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
                self._apply(stored, gate.members_changed())
                self._answer(stored.chunk.index, effects)
            self._finish_capture(effects)

    def _clock_of(self, hello: m.Hello) -> int:
        """Number of the next contribution of a worker to this shard's trainable chunks."""
        chunks, trainable = self._columns.chunks(hello.slot), self._columns.trainable(hello.slot)
        if not self._mode.synchronous:
            clocks = (self._gates[stored.chunk.index].clock_of(hello.slot) for stored in chunks)
            return self._members.first_seq + max(clocks, default=0)
        if hello.slot in self._members.ended:  # it waits for the others, wherever they are
            return min((s.version for s in trainable), default=self._members.first_seq)
        return self._next_number(hello, trainable)

    def _next_number(self, hello: m.Hello, chunks: Iterable[StoredChunk]) -> int:
        first, rounds = self._members.first_seq, self._mode.synchronous
        windows = [  # a round is named by the version that it changes
            s.window(hello.slot, hello.worker_epoch, s.version if rounds and s.trainable else first) for s in chunks
        ]
        return min((window.next_number for window in windows), default=first)

    def _settle(self, slot: int, worker_epoch: int, done: int, first: int = -1) -> None:
        """A worker has answers to all contributions from ``first`` (-1: the job's first) on and below ``done``: what of
        them is not here was lost with a former process of this shard."""
        if not self._recovered or done < 0:
            return
        for stored in self._columns.trainable(slot):
            window = stored.restored_window(slot, worker_epoch, self._members.first_seq if first < 0 else first)
            if window is not None:
                window.settle(first)  # below it there never was anything
                self.stats.lose(slot, stored.chunk.index, window.settle(done))

    def _initialise(self, peer: Peer, init: m.Init, effects: list[Effect]) -> None:
        stored = self._stored(peer, init.request, init.chunk, init.payload, effects)
        if stored is None:
            return
        if not self._columns.owns(init.slot, stored):
            reason = f"the first weights of chunk {init.chunk} come from another rank of a replica"
            self._refuse(peer, init.request, Refusal.MALFORMED, reason, effects)
            return
        if stored.trainable and not is_finite(from_bytes(init.payload, stored.chunk.dtype)):
            names = ", ".join(t.name for t, *_ in self.layout.pieces_of(stored.chunk))
            reason = f"the initial weights hold NaN or Inf, in one of: {names}"
            self._refuse(peer, init.request, Refusal.NON_FINITE, reason, effects)
            return
        if not stored.initialised:
            stored.initialise(init.payload)
            stored.given_to(init.slot)  # who has them, and need not fetch them
        effects.append(Reply(peer, m.Ack(init.request, stored.version)))
        self._answer(init.chunk, effects)

    def _fetch(self, peer: Peer, pull: m.Pull, now_s: float, effects: list[Effect]) -> None:
        stored, memory = self.chunks.get(pull.chunk), self._memory_of(pull)
        if stored is None:
            self._refuse(peer, pull.request, Refusal.MALFORMED, f"chunk {pull.chunk} is not here", effects)
            return
        if not stored.trainable or (memory is not None and not memory.in_place):
            memory = None  # which it is too where a replica has several ranks: what they pull is sent
        seq = pull.after if stored.trainable else -1
        fetch = _Fetch(peer, pull.request, pull.slot, seq, now_s, memory, pull.version, pull.held)
        self._fetches[pull.chunk].append(fetch)
        self._answer(pull.chunk, effects)

    def _pushed_to(
        self, peer: Peer, request: int, chunk: int, payload: m.Buffer, effects: list[Effect]
    ) -> StoredChunk | None:
        """The chunk of a contribution's payload; None, and refused, if it cannot be one of it."""
        return self._stored(peer, request, chunk, payload, effects, self._pushed_bytes.get(chunk))

    def _stored(
        self,
        peer: Peer,
        request: int,
        chunk: int,
        payload: m.Buffer,
        effects: list[Effect],
        nbytes: int | None = None,
    ) -> StoredChunk | None:
        """The chunk of a payload, which has its size, or ``nbytes``; None, and refused, if it has not."""
        stored = self.chunks.get(chunk)
        size = memoryview(payload).nbytes
        if stored is None:
            self._refuse(peer, request, Refusal.MALFORMED, f"chunk {chunk} is not here", effects)
        elif size != (expected := stored.nbytes if nbytes is None else nbytes):
            reason = f"chunk {chunk} has {expected} bytes, the payload {size}"
            self._refuse(peer, request, Refusal.MALFORMED, reason, effects)
            return None
        return stored

    def _admits(self, peer: Peer, message: FromWorker, effects: list[Effect]) -> bool:
        """Whether the sender belongs here: the job's own, and a member as it is now."""
        if message.job != self.identity.job:
            reason = f"this is a shard of job {self.identity.job}, not of {message.job}"
            self._refuse(peer, message.request, Refusal.WRONG_JOB, reason, effects)
            return False
        objection = self._members.objection(message.slot, message.worker_epoch)
        if objection is not None:
            self._refuse(peer, message.request, *objection, effects)
            return False
        if self._lodging.host is not None and self._lodging.host != (message.slot, message.worker_epoch):
            self._lodging.review()  # the first word of a worker may make it a member
        return True

    def _refuse(self, peer: Peer, request: int, code: Refusal, reason: str, effects: list[Effect]) -> None:
        self.stats.refused += 1
        effects.append(Reply(peer, m.Refused(request, code.value, reason)))
