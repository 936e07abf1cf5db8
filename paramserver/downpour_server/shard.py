"""The shard as a state machine: messages in, effects out. No sockets, no clock, no files.

``handle`` is the only method that changes state. Time comes in with each event and is only compared with
itself, so safety never depends on a wall clock.

It takes each message, lets in who belongs to the job, and hands it to the part that sees to it: ``contributions.py``
(exactly once), ``fetches.py``, ``epochs.py``, ``greeting.py``, ``captures.py`` (snapshots). ``updates.py`` is where
all of them meet: what is due is applied, and whatever that lets go is answered. ``common.py`` has what they share.

A message of a worker that is not a member, or has been replaced, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from downpour_common import messages as m
from downpour_common.compensation import SPARE_BASES, CompensationSpec
from downpour_common.compression import NO_COMPRESSION, Compression
from downpour_common.errors import ProtocolError
from downpour_common.layout import Layout, SharedLayout
from downpour_common.messages import Message, Refusal
from downpour_common.modes import Mode
from downpour_common.transport import Peer
from downpour_server import residuals
from downpour_server.attached import AttachedMemory, Lodging
from downpour_server.captures import Captures
from downpour_server.coding import coding_for
from downpour_server.columns import Columns
from downpour_server.common import Common
from downpour_server.contribution import Contribution
from downpour_server.contributions import Contributions
from downpour_server.effects import Attach, Effect, Reply
from downpour_server.endings import Endings
from downpour_server.epochs import Epochs
from downpour_server.fetches import Fetches
from downpour_server.greeting import Greeting
from downpour_server.members import Members
from downpour_server.noise import NoiseMeter
from downpour_server.passes import Passes, Trail
from downpour_server.policy import Gate, gate_for
from downpour_server.policy.stale import StaleGate
from downpour_server.refusals import Refusals
from downpour_server.settling import Settling
from downpour_server.staged import StagedPayloads
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk
from downpour_server.tensors import Scratch, from_bytes, is_finite
from downpour_server.updates import Updates
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
        self._mode = mode
        self._timeout_s = timeout_s
        self._members = Members(workers, take_over=mode.synchronous)
        self._columns = Columns(layout, self.chunks, self._members)
        self._gates: dict[int, Gate] = {}

        def too_late(contribution: Contribution) -> None:
            self.stats.count_late(contribution.slot, contribution.seq)

        for index, stored in self.chunks.items():
            group = stored.chunk.group if stored.trainable else -1
            gate = gate_for(mode, group, self._columns.members_of(stored), stored, too_late)
            if warm_start and isinstance(gate, StaleGate):
                gate.let_lead(self._columns.ranks, warm_start)
            self._gates[index] = gate
        self._attached: dict[int, AttachedMemory] = {}
        """by slot"""
        self._stays_home = False
        self._lodging = Lodging(self.chunks.values(), self._members)
        self._staged = StagedPayloads()
        self._passes = Passes()
        self._trail = Trail() if keep_previous else None
        self._refusals = Refusals(self.chunks, self.stats)
        common = Common(
            self.chunks,
            self._trainable,
            self._gates,
            self._members,
            self._columns,
            self._passes,
            self._trail,
            self._attached,
            self._lodging,
            self.stats,
            self._refusals,
            mode.synchronous,
        )
        self._settling = Settling(common)
        self._fetches = Fetches(common)
        self._endings = Endings(common)
        self._captures = captures = Captures(common, identity.job, identity.shard)
        self._updates = updates = Updates(common, self._fetches, self._endings, captures, self.noise)
        self._epochs = Epochs(common, self._endings, updates, captures)
        self._greeting = Greeting(common, identity.shard, layout.digest, self._settling, updates, captures)
        self._contributions = Contributions(
            common,
            identity.shard_epoch,
            self._staged,
            self._settling,
            self._fetches,
            updates,
            captures,
            push_dtype,
            skip_non_finite,
        )
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
        self._settling.recovered = True
        for stored in self._trainable:
            stored.forget_views(self.identity.shard_epoch)

    def handle(self, peer: Peer, message: Message, now_s: float) -> list[Effect]:
        """Take one message from a worker; returns what is to be done, in order."""
        effects: list[Effect] = []
        match message:
            case m.PushPull() | m.Push() | m.PushPullHeld():
                if self._admits(peer, message, effects):
                    self._contributions.take(peer, message, message.payload, now_s, effects)
            case m.PushPullShared():
                if self._admits(peer, message, effects):
                    self._contributions.take_shared(peer, message, now_s, effects)
            case m.Stage():
                if self._admits(peer, message, effects):
                    self._contributions.stage(peer, message, effects)
            case m.PushPullStaged():
                if self._admits(peer, message, effects):
                    self._contributions.take_staged(peer, message, now_s, effects)
            case m.Pull():
                if self._admits(peer, message, effects) and self._fetches.pull(peer, message, now_s, effects):
                    self._updates.answer(message.chunk, effects)
            case m.PushPortion():
                if self._admits(peer, message, effects):
                    stored = self._refusals.stored(peer, message.request, message.chunk, message.payload, effects)
                    if stored is not None and message.shard_epoch >= self.identity.shard_epoch:
                        effects.append(Reply(peer, take_portion(self.vectors, stored, message, self.stats)))
            case m.AttachMemory():
                if self._admits(peer, message, effects):
                    effects.append(Attach(peer, message))
            case m.Hello():
                if self._admits(peer, message, effects):
                    self._greeting.greet(peer, message, self.identity.shard_epoch, effects)
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
                    self._epochs.end(peer, message, now_s, effects)
            case m.Leave():
                if self._admits(peer, message, effects):
                    self._leave(peer, message, effects)
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
            self._settling.settle(slot, epoch, done, first)
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
        self._epochs.members_changed(effects)
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
            self._refusals.refuse(attach.peer, offer.request, Refusal.NOT_SHARED, reason, effects)
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
        self._fetches.overdue(now_s, self._timeout_s, effects)
        self._endings.overdue(now_s, self._timeout_s, effects)
        return effects

    def snapshot(self, snapshot: int, folder: str, at_clock: int) -> list[Effect]:
        """Begin a snapshot; see :class:`downpour_server.snapshot.Capture`."""
        effects: list[Effect] = []
        self._captures.begin(snapshot, folder, at_clock, effects)
        return effects

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
        self._contributions.shard_epoch = term
        self._fetches.clear()
        self._endings.clear()
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
        return self._contributions.payload_of(push)

    # ------------------------------------------------------------ everything else

    def _keep_residual(self, peer: Peer, message: m.Residual, effects: list[Effect]) -> None:
        stored = self._refusals.stored(peer, message.request, message.chunk, message.payload, effects)
        if stored is not None:
            self._captures.keep_residual(message, stored)
            effects.append(Reply(peer, m.Ack(message.request, stored.version)))
            self._captures.finish(effects)

    def _leave(self, peer: Peer, message: m.Leave, effects: list[Effect]) -> None:
        effects.append(Reply(peer, m.Ack(message.request, 0)))
        self._settling.settle(message.slot, message.worker_epoch, message.done)
        self._members.leave(message.slot)
        self._not_computing(message.slot)
        self._staged.drop(message.slot)
        self._captures.release(message.slot)
        self._lodging.review()
        self._epochs.members_changed(effects)

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
        self._endings.dismiss(slot, reason, effects)
        self._fetches.dismiss(slot, reason, effects)
        self._attached.pop(slot, None)
        self._staged.drop(slot)
        self._captures.release(slot)

    def _initialise(self, peer: Peer, init: m.Init, effects: list[Effect]) -> None:
        stored = self._refusals.stored(peer, init.request, init.chunk, init.payload, effects)
        if stored is None:
            return
        if not self._columns.owns(init.slot, stored):
            reason = f"the first weights of chunk {init.chunk} come from another rank of a replica"
            self._refusals.refuse(peer, init.request, Refusal.MALFORMED, reason, effects)
            return
        if stored.trainable and not is_finite(from_bytes(init.payload, stored.chunk.dtype)):
            names = ", ".join(t.name for t, *_ in self.layout.pieces_of(stored.chunk))
            reason = f"the initial weights hold NaN or Inf, in one of: {names}"
            self._refusals.refuse(peer, init.request, Refusal.NON_FINITE, reason, effects)
            return
        if not stored.initialised:
            stored.initialise(init.payload)
            stored.given_to(init.slot)  # who has them, and need not fetch them
        effects.append(Reply(peer, m.Ack(init.request, stored.version)))
        self._updates.answer(init.chunk, effects)

    def _admits(self, peer: Peer, message: FromWorker, effects: list[Effect]) -> bool:
        """Whether the sender belongs here: the job's own, and a member as it is now."""
        if message.job != self.identity.job:
            reason = f"this is a shard of job {self.identity.job}, not of {message.job}"
            self._refusals.refuse(peer, message.request, Refusal.WRONG_JOB, reason, effects)
            return False
        objection = self._members.objection(message.slot, message.worker_epoch)
        if objection is not None:
            self._refusals.refuse(peer, message.request, *objection, effects)
            return False
        if self._lodging.host is not None and self._lodging.host != (message.slot, message.worker_epoch):
            self._lodging.review()  # the first word of a worker may make it a member
        return True
