"""The training of one job, as its coordinator sees it: who has joined, whose samples are whose, barriers, snapshots.

A state machine: messages in, effects out. No sockets, no clock, no files. It survives a restart of its process
through :meth:`Training.document`: senders repeat what was not answered, an answer is given again to a repeat, and
where a sender can be reached now follows from what it sent last.

What messages lead to stands in :mod:`shard_words`, :mod:`worker_words`, :mod:`membership` and :mod:`answers`, and the
snapshots in :mod:`snapshotting`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.names import process_name
from downpour_common.replicas import is_lead
from downpour_common.transport import Peer
from downpour_coordinator.agreements import Agreements
from downpour_coordinator.answers import minimise, release_barriers
from downpour_coordinator.barriers import Barriers
from downpour_coordinator.data import DataState
from downpour_coordinator.effects import LogRow, Send, StorePart, TrainingEffect
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.leases import Span
from downpour_coordinator.losses import Lost, add_slots, late_of, non_finite_of, slots_of, staleness_of
from downpour_coordinator.membership import answer_waiting, register, set_members, set_up_shard, tell_members
from downpour_coordinator.minimiser import Minimiser
from downpour_coordinator.participants import ShardEntry, Worker
from downpour_coordinator.replicas import Backup, introduce, promote
from downpour_coordinator.reports import check_snapshot
from downpour_coordinator.shard_words import from_backup, heard, moved_since, promoted, take_report
from downpour_coordinator.snapshotting import Snapshots, manifest_of
from downpour_coordinator.training_document import document_of, restore
from downpour_coordinator.worker_words import nobody_to_wait_for, take_request

REPORTS_NEEDED = 2
"""Reports of each shard, from the beginning of the training on, that tell its pace."""


class Training:
    """State of one job; see the module. ``failures`` collects what scripts reported, the first first. ``folder``:
    where a checkpoint of this number lies, as the shards are told.

    What begins with an underscore is for the functions of the modules named above as well, and for nobody else."""

    def __init__(self, facts: JobFacts, folder: Callable[[int], str] = str) -> None:
        self.facts = facts
        self.workers = {slot: Worker(slot) for slot in range(facts.workers)}
        self.shards = {index: ShardEntry(index, facts.shard_epoch) for index in range(facts.shards)}
        self.backups: dict[int, Backup] = {}
        """by shard, in jobs with replication"""
        self.without_backups = False
        """it may begin before they have caught up"""
        self.failures: list[m.ReportFailure] = []
        self.setup_error = ""
        self.latest: dict[str, float] = {}
        self.torn = 0
        self.done_because = ""
        """why the scripts are to end, as one of them has said"""
        self.former: list[m.Progress] = []
        """the last words of workers whose slots others have now"""
        self._folder = folder
        self.model: ModelSpec | None = None
        self.begun = False
        """Whether the first workers have been welcomed together."""
        self._left: list[tuple[int, int, int, int]] = []
        """slot, epoch, first and next number of each worker that has said goodbye"""
        self._waiting: dict[int, ModelSpec] = {}
        self._data = DataState(facts.epoch, facts.done if facts.resume else ())
        self._barriers = Barriers()
        self._agreements = Agreements()
        self._minimiser = Minimiser(facts.mode, facts.shards, facts.clock)
        self._passes: dict[int, tuple[Peer, m.BeginPass]] = {}
        """slots whose pass cannot begin before the members have changed"""
        self._version = 0
        self._members = dict.fromkeys(range(facts.workers), 0)
        """slot → epoch of the workers that the shards wait for (or will, once they have the newest version)"""
        self._told = tuple(range(facts.workers))
        """members that the workers were told last"""
        self._snapshots = Snapshots()
        self._clock = facts.clock
        """largest clock known beside what the present workers report"""

    # ------------------------------------------------------------ events

    def handle(self, peer: Peer, message: Message) -> list[TrainingEffect]:
        """Take one message; returns what is to be done, in order. Raises :class:`ProtocolError` for nonsense."""
        effects: list[TrainingEffect] = []
        match message:
            case m.FromShard() | m.SnapshotPart():
                self._from_shard(peer, message, effects)
            case m.RegisterWorker():
                if self._worker(peer, message, effects) is not None:
                    register(self, peer, message, effects)
            case m.WorkerRequest():
                if (worker := self._worker(peer, message, effects)) is not None:
                    take_request(self, worker, peer, message, effects)
            case m.Progress():
                if (worker := self._worker(peer, message, effects)) is not None:
                    worker.progress = message
                    moved_since(self, worker, message.shard_epochs, effects)
                    if self.done_because and not worker.gone:  # to one that joins late, or where it was lost
                        effects.append(Send(peer, m.ShouldStop(self.done_because, by_script=True)))
            case m.ReportFailure():
                if self._worker(peer, message, effects) is not None:
                    self.failures.append(message)
            case _:
                raise ProtocolError(f"the coordinator does not take {type(message).__name__}")
        return effects

    def expect(self, slot: int, epoch: int) -> None:
        """A worker is being started for ``slot``, beside or instead of those that there were."""
        before = self.workers.get(slot)
        if before is not None and before.progress is not None:
            self.former.append(before.progress)
            self._clock = max(self._clock, before.progress.clock)
        self.workers[slot] = Worker(slot, epoch=epoch)
        self._minimiser.release(slot)
        if not self.begun:
            self._members[slot] = epoch
        self._waiting.pop(slot, None)
        self._agreements.replaced(slot, slot // self.facts.ranks, epoch)

    def take_over(self, slot: int, epoch: int) -> None:
        """sync: the worker of ``slot`` has died in the middle of a round, and another process is to go on where it
        was. The slot stays a member, and what its worker has entered and begun counts."""
        before = self.workers[slot]
        self.expect(slot, epoch)
        former = max(before.begun, before.former)
        self.workers[slot] = Worker(slot, epoch=epoch, takes_over=True, start=before.start, former=former)
        self._passes.pop(slot, None)
        self._barriers.taken_over(slot)

    def expect_server(self, process: int, epoch: int) -> None:
        """A server process is being started: one that is to lead from the beginning, or a backup."""
        index = process % self.facts.shards
        shard = self.shards[index]
        if shard.process != process:
            self.backups[index] = Backup(process, epoch)
        else:
            shard.epoch, shard.term = epoch, max(epoch, shard.term)

    def follows(self, process: int) -> bool:
        """Whether this server process is started as a backup."""
        return self.shards[process % self.facts.shards].process != process

    def promote(self, index: int) -> list[TrainingEffect]:
        """The process that leads a shard is no more, and its backup, which can, takes its place."""
        shard = self.shards[index]
        effects: list[TrainingEffect] = list(promote(shard, self.backups.pop(index)))
        return [*effects, LogRow({"leads": self.name_of(shard.process), "term": shard.term})]

    def waits_for_backups(self) -> bool:
        """Whether nothing else is missing for the first step."""
        if self.begun or self.model is None or self.without_backups or all(b.promotable for b in self.backups.values()):
            return False
        return all(s.serves for s in self.shards.values()) and all(w.pid or w.gone for w in self.workers.values())

    def begin_without_backups(self) -> list[TrainingEffect]:
        """The workers begin now, and those that are missing catch up later."""
        effects: list[TrainingEffect] = []
        self.without_backups = True
        answer_waiting(self, effects)
        return effects

    def backup_lost(self, index: int) -> list[TrainingEffect]:
        """The backup of a shard has ended, or is given up."""
        backup = self.backups.get(index)
        return [] if backup is None else list(backup.give_up(self.shards[index]))

    def parts(self) -> dict[tuple[str, int], tuple[str, int]]:
        """("leader", shard) and ("backup", shard) → key of that process, for shards whose backup could lead."""
        found: dict[tuple[str, int], tuple[str, int]] = {}
        for index, backup in self.backups.items():
            if backup.promotable:
                found["leader", index] = ("server", self.shards[index].process)
                found["backup", index] = ("server", backup.process)
        return found

    def name_of(self, process: int) -> str:
        """What a server process is called."""
        return process_name("server", process, self.facts.shards)

    def shard_lost(self, index: int, epoch: int) -> None:
        """async, ssp: the process of a shard has died, and another one, of ``epoch``, is to take its place."""
        shard = self.shards[index]
        shard.past.add(shard.report)
        term = epoch if self.facts.replication == 1 else shard.term + 1
        self.shards[index] = ShardEntry(
            index, epoch, recovers=True, past=shard.past, process=shard.process, term=term, moved=True
        )

    def shard_resumes(self, index: int, checkpoint: int) -> list[TrainingEffect]:
        """The checkpoint that a shard comes back from has been found."""
        shard = self.shards[index]
        shard.checkpoint = checkpoint
        shard.past.resumed(checkpoint)
        return set_up_shard(self, shard)

    def anew(self, facts: JobFacts) -> Training:
        """The training that begins again, from nothing or a checkpoint of this one."""
        after = Training(facts, self._folder)
        number = facts.resume.rpartition("/")[2]
        for index, shard in after.shards.items():
            shard.past.cuts = dict(self.shards[index].past.cuts)
            shard.past.resumed(int(number) if number.isdecimal() else 0)
            if facts.replication > 1:
                shard.term = self.shards[index].term + 1
        return after

    def worker_gone(self, slot: int, effects: list[TrainingEffect], done: bool = False) -> None:
        """The worker of ``slot`` has left the shards: what it held is free, and nobody waits for it.

        ``done``: its script had come to its end; then its part of the work is done, and the others keep theirs.
        """
        worker = self.workers.get(slot)
        if worker is None or worker.gone:
            return
        worker.gone = True
        self._waiting.pop(slot, None)
        self._passes.pop(slot, None)
        self._members.pop(slot, None)
        self._barriers.leave(slot)
        self._data.release(slot)
        self._minimiser.release(slot)
        minimise(self, effects)
        release_barriers(self, effects)
        nobody_to_wait_for(self, effects)
        answer_waiting(self, effects)
        if self.begun and not done:
            tell_members(self, effects)

    def turn_away(self) -> None:
        """Nobody is let in any more: those who wait come too late for their work to be in the result."""
        self._waiting.clear()

    def worker_lost(self, slot: int) -> list[TrainingEffect]:
        """The worker of ``slot`` has ended without leaving: the shards are told not to wait for it."""
        effects: list[TrainingEffect] = []
        worker = self.workers.get(slot)
        if worker is not None and not worker.gone:
            counted = slot in self._members
            self.worker_gone(slot, effects)
            if counted and self.begun:
                set_members(self, effects)
        return effects

    @property
    def paced(self) -> bool:
        """Whether there is something to keep, and enough is known to choose a clock for a synchronous snapshot well."""
        if any(s.report.get("initialised") is False for s in self.shards.values()):
            return False  # it has said so; one that has not may be asked in vain
        return not self.facts.mode.synchronous or all(s.reports >= REPORTS_NEEDED for s in self.shards.values())

    def begin_snapshot(self, number: int, folder: str, final: bool = False) -> list[TrainingEffect]:
        """Ask every shard for a snapshot; nothing while one is under way or the model is unknown.

        In the synchronous mode all shards take it at one clock a little ahead of what the workers reported last.
        """
        if self.model is None or not all(s.serves for s in self.shards.values()):
            return []
        if self.snapshot and not final:
            return []
        manifest = manifest_of(self.facts, self.model, self.clock(), *self.data_position())
        ahead = self.facts.mode.synchronous and not final
        self._snapshots.begin(number, folder, manifest, self.shards, ahead)
        return self.repeat_snapshot()

    def repeat_snapshot(self) -> list[TrainingEffect]:
        """Ask again those shards whose answer to the snapshot under way has not come."""
        return list(self._snapshots.requests(self.shards))

    def abandon_snapshot(self) -> None:
        """The snapshot under way is not awaited any more."""
        self._snapshots.abandon()

    @property
    def snapshot(self) -> int:
        """Number of the snapshot under way, or 0."""
        return self._snapshots.number

    def ask_to_stop(self, reason: str) -> list[TrainingEffect]:
        """Tell every worker's script that it should end."""
        return [Send(w.peer, m.ShouldStop(reason)) for w in self.workers.values() if w.peer and not w.gone]

    def stop_shards(self) -> list[TrainingEffect]:
        """Tell every shard that the job is over."""
        peers = [s.peer for s in self.shards.values()] + [b.peer for b in self.backups.values()]
        return [Send(peer, m.StopShard()) for peer in peers if peer]

    def servers_ready(self) -> set[int]:
        """Indices of the server processes that have been set up."""
        ready = {s.process for s in self.shards.values() if s.ready}
        return ready | {b.process for b in self.backups.values() if b.ready}

    # ------------------------------------------------------------ what it knows

    @property
    def training(self) -> bool:
        """Whether the job has begun and every worker that has not gone is in it."""
        return self.begun and all(w.answered or w.gone for w in self.workers.values())

    def waiting_for(self) -> list[str]:
        """The processes that are still to join, by name."""
        missing = [self.name_of(s.process) for s in self.shards.values() if not s.address]
        if not self.without_backups:
            missing += [self.name_of(b.process) for b in self.backups.values() if not b.address]
        missing += [f"worker/{w.slot}" for w in self.workers.values() if not w.pid and not w.gone]
        if not missing and self.waits_for_backups():
            missing = [self.name_of(b.process) for b in self.backups.values() if not b.promotable]
        return missing

    def live(self) -> list[int]:
        """Slots of the workers that train, ascending."""
        return sorted(w.slot for w in self.workers.values() if w.answered and not w.gone)

    def staleness(self) -> Counter[int]:
        """Contributions by staleness, over all shards."""
        total: Counter[int] = Counter()
        for shard in self.shards.values():
            total.update(shard.past.staleness)
            total.update(staleness_of(shard.report))
        return total

    def staleness_by_slot(self) -> dict[int, list[int]]:
        """Of each slot's contributions, see :func:`downpour_coordinator.losses.slots_of`."""
        total: dict[int, list[int]] = {}
        for shard in self.shards.values():
            add_slots(total, shard.past.slots)
            add_slots(total, slots_of(shard.report))
        return total

    def lost(self) -> dict[int, Lost]:
        """What each shard that has lost pushes has lost, by its index."""
        lost = {s.index: s.past.total(s.report) for s in self.shards.values()}
        return {index: n for index, n in lost.items() if n.contributions}

    def non_finite(self) -> Counter[int]:
        """Contributions to chunks with NaN or Inf, by the slot they came from."""
        total: Counter[int] = Counter()
        for shard in self.shards.values():
            total.update(shard.past.non_finite)
            total.update(non_finite_of(shard.report))
        return total

    def uncompensated(self) -> int:
        """Contributions to chunks that the present shards could not compensate, and applied as they were."""
        return sum(int(shard.report.get("uncompensated", 0)) for shard in self.shards.values())

    def late(self) -> Counter[int]:
        """``sync,backup=b``: contributions that came after their round, by the slot they came from; as the shard says
        that has seen the most."""
        most: Counter[int] = Counter()
        for shard in self.shards.values():
            most |= shard.past.late + Counter(late_of(shard.report))
        return most

    def clock_gap_max(self) -> int:
        """The largest gap between two workers' clocks that a shard has seen."""
        gaps = [max(s.past.clock_gap_max, int(s.report.get("clock_gap_max", 0))) for s in self.shards.values()]
        return max(gaps, default=0)

    def recovering(self) -> list[ShardEntry]:
        """Shards that have died, and that workers cannot speak to yet."""
        return [s for s in self.shards.values() if s.recovers and not s.serves]

    def away(self) -> list[ShardEntry]:
        """These, and those that a backup takes over."""
        return [s for s in self.shards.values() if s.away]

    def clock(self) -> int:
        """The largest clock that a worker has reported."""
        return max([self._clock, *(w.progress.clock for w in self.workers.values() if w.progress)])

    def torn_samples(self) -> int:
        """Samples that left with a worker in the middle of a pass and that nobody has trained, so far."""
        return self.torn + self._data.returned()

    def data_position(self) -> tuple[int, list[Span]]:
        """The pass over the first loader that the last worker is in, and what of it is done."""
        leads = [w for w in self.workers.values() if self._leads(w.slot)]
        finished = [w.progress.epoch for w in leads if w.progress is not None]
        return self._data.position((w.slot for w in leads if not w.gone), finished)

    def _leads(self, slot: int) -> bool:
        """Whether this worker takes samples, for itself or for its replica."""
        return is_lead(slot, self.facts.ranks)

    # ------------------------------------------------------------ shards

    def _from_shard(self, peer: Peer, message: m.FromShard | m.SnapshotPart, effects: list[TrainingEffect]) -> None:
        count = self.facts.shards
        if not 0 <= message.shard < count * self.facts.replication or message.job != self.facts.job:
            raise ProtocolError(f"there is no server/{message.shard} of {message.job} here")
        shard, backup = self.shards[message.shard % count], self.backups.get(message.shard % count)
        if backup is not None and (backup.process, backup.epoch) == (message.shard, message.shard_epoch):
            from_backup(self, shard, backup, peer, message, effects)
            return
        if (message.shard, message.shard_epoch) != (shard.process, shard.epoch):
            return  # of a process that is being ended, or has ended
        message = replace(message, shard=shard.index)
        shard.peer = peer
        match message:
            case m.RegisterShard():
                shard.address, shard.pid = message.address, message.pid
                effects.extend(set_up_shard(self, shard))
            case m.ShardReady():
                heard(self, shard, effects, ready=not message.error, error=message.error)
                effects.extend(introduce(shard, backup))
            case m.Promoted():
                promoted(self, shard, message.term, message.error, effects)
            case m.ShardReport():
                take_report(self, shard, message.document, effects)
            case m.MembersSet():
                heard(self, shard, effects, members=message.version)
            case m.VectorsDone():
                self._minimiser.done(shard.index, message)
                minimise(self, effects)
            case m.SnapshotTaken():
                if not message.error:
                    check_snapshot(message.document, message.shard)
                    shard.past.cut(message.snapshot, message.document, shard.report)
                if (outcome := self._snapshots.taken(message)) is not None:
                    effects.append(outcome)
            case m.SnapshotPart() if self.snapshot and message.snapshot == self.snapshot:
                effects.append(StorePart(peer, message))
            case m.SnapshotPart():
                reason = f"snapshot {message.snapshot} is not wanted any more"
                effects.append(Send(peer, m.Refused(message.request, Refusal.CHECKPOINT.value, reason)))

    # ------------------------------------------------------------ workers

    def _worker(
        self, peer: Peer, message: m.WorkerRequest | m.WorkerNotice, effects: list[TrainingEffect]
    ) -> Worker | None:
        """The sender's slot, if it is the one that is there now; an impostor's request is refused."""
        worker = self.workers.get(message.slot)
        code, reason = "", ""
        if worker is None or message.job != self.facts.job:
            code = Refusal.WRONG_JOB.value
            reason = f"job {message.job!r}, slot {message.slot} does not belong here (job {self.facts.job!r})"
        elif message.worker_epoch != worker.epoch:
            code = Refusal.STALE_EPOCH.value
            reason = f"worker/{message.slot} has been replaced: epoch {message.worker_epoch} is not {worker.epoch}"
        if code or worker is None:
            if isinstance(message, m.WorkerRequest):
                effects.append(Send(peer, m.Refused(message.request, code, reason)))
            return None
        if not worker.peer and worker.answered:  # the first word since this process was started
            effects.append(Send(peer, m.MembersChanged(self._told)))
        worker.peer = peer
        return worker

    # ------------------------------------------------------------ durability

    def document(self) -> dict[str, Any]:
        """All that must survive the process, but for the model, as plain values. A snapshot under way does not."""
        return document_of(self)

    @classmethod
    def from_document(
        cls, document: dict[str, Any], model: ModelSpec | None, folder: Callable[[int], str] = str
    ) -> Training:
        """The inverse of :meth:`document`. Workers that waited for a welcome will ask again."""
        training = cls(JobFacts.from_document(document["facts"]), folder)
        restore(training, document, model)
        return training
