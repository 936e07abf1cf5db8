"""The training of one job, as its coordinator sees it: who has joined, whose samples are whose, barriers, snapshots.

A state machine: messages in, effects out. No sockets, no clock, no files. It survives a restart of its process
through :meth:`Training.document`: senders repeat what was not answered, an answer is given again to a repeat, and
where a sender can be reached now follows from what it sent last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.modifiers import WARM_START
from downpour_common.names import process_name
from downpour_common.replicas import is_lead
from downpour_common.transport import Peer
from downpour_coordinator.agreements import Agreements
from downpour_coordinator.barriers import Barriers
from downpour_coordinator.data import DataState
from downpour_coordinator.effects import LogRow, Send, StorePart, StoreSpans, TrainingEffect
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.leases import Span, merge
from downpour_coordinator.losses import Lost, add_slots, late_of, non_finite_of, slots_of, staleness_of
from downpour_coordinator.minimiser import Minimiser
from downpour_coordinator.participants import ShardEntry, Worker, progress_from
from downpour_coordinator.replicas import Backup, ask_again, caught_up, introduce, promote
from downpour_coordinator.reports import check_report, check_snapshot
from downpour_coordinator.snapshots import Round, SnapshotFailed

LEAST_MARGIN, LARGEST_MARGIN = 2, 4096
"""Clocks that a synchronous snapshot is put ahead of where the shards are expected to be when the request arrives."""
REPORTS_NEEDED = 2
"""Reports of each shard, from the beginning of the training on, that tell its pace."""
REASON_CHARACTERS = 200
"""Of why the training is done."""
ANSWERS_KEPT = 64
"""Answers remembered per worker, for repeats of its requests."""


class Training:
    """State of one job; see the module. ``failures`` collects what scripts reported, the first first. ``folder``:
    where a checkpoint of this number lies, as the shards are told."""

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
        self._round: Round | None = None
        self._margin = LEAST_MARGIN
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
                    self._register_worker(peer, message, effects)
            case m.WorkerRequest():
                if (worker := self._worker(peer, message, effects)) is not None:
                    self._request(worker, peer, message, effects)
            case m.Progress():
                if (worker := self._worker(peer, message, effects)) is not None:
                    worker.progress = message
                    self._moved_since(worker, message.shard_epochs, effects)
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
        self._welcome(effects)
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
        return self._set_up(shard)

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
        self._minimise(effects)
        self._release_barriers(effects)
        self._nobody_to_wait_for(effects)
        self._welcome(effects)
        if self.begun and not done:
            self._tell_members(effects)

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
                self._set_members(effects)
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
        if self._round is not None and not final:
            return []
        at_clock = -1
        if self.facts.mode.synchronous and not final:
            at_clock = self._clock_ahead()
        self._round = Round(number, folder, len(self.shards), self._manifest(), at_clock)
        return self.repeat_snapshot()

    def repeat_snapshot(self) -> list[TrainingEffect]:
        """Ask again those shards whose answer to the snapshot under way has not come."""
        if self._round is None:
            return []
        request = m.TakeSnapshot(self._round.number, self._round.folder, self._round.at_clock)
        return [Send(self.shards[i].peer, request) for i in self._round.missing() if self.shards[i].peer]

    def abandon_snapshot(self) -> None:
        """The snapshot under way is not awaited any more."""
        self._round = None

    @property
    def snapshot(self) -> int:
        """Number of the snapshot under way, or 0."""
        return 0 if self._round is None else self._round.number

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

    def _whole(self) -> list[int]:
        """Slots that wait to be let in and whose replicas do so as a whole."""
        ranks = self.facts.ranks
        complete = Counter(slot // ranks for slot in self._waiting)
        return [slot for slot in self._waiting if complete[slot // ranks] == ranks]

    # ------------------------------------------------------------ shards

    def _from_shard(self, peer: Peer, message: m.FromShard | m.SnapshotPart, effects: list[TrainingEffect]) -> None:
        count = self.facts.shards
        if not 0 <= message.shard < count * self.facts.replication or message.job != self.facts.job:
            raise ProtocolError(f"there is no server/{message.shard} of {message.job} here")
        shard, backup = self.shards[message.shard % count], self.backups.get(message.shard % count)
        if backup is not None and (backup.process, backup.epoch) == (message.shard, message.shard_epoch):
            self._from_backup(shard, backup, peer, message, effects)
            return
        if (message.shard, message.shard_epoch) != (shard.process, shard.epoch):
            return  # of a process that is being ended, or has ended
        message = replace(message, shard=shard.index)
        shard.peer = peer
        match message:
            case m.RegisterShard():
                shard.address, shard.pid = message.address, message.pid
                effects.extend(self._set_up(shard))
            case m.ShardReady():
                self._heard(shard, effects, ready=not message.error, error=message.error)
                effects.extend(introduce(shard, backup))
            case m.Promoted():
                self._promoted(shard, message.term, message.error, effects)
            case m.ShardReport():
                self._report(shard, message.document, effects)
            case m.MembersSet():
                self._heard(shard, effects, members=message.version)
            case m.VectorsDone():
                self._minimiser.done(shard.index, message)
                self._minimise(effects)
            case m.SnapshotTaken():
                if not message.error:
                    check_snapshot(message.document, message.shard)
                    shard.past.cut(message.snapshot, message.document, shard.report)
                if self._round is not None and (outcome := self._round.taken(message)) is not None:
                    self._round = None
                    if isinstance(outcome, SnapshotFailed):
                        self._margin = min(self._margin * 2, LARGEST_MARGIN)
                    else:
                        self._margin = max(self._margin // 2, LEAST_MARGIN)
                    effects.append(outcome)
            case m.SnapshotPart() if self._round is not None and message.snapshot == self._round.number:
                effects.append(StorePart(peer, message))
            case m.SnapshotPart():
                reason = f"snapshot {message.snapshot} is not wanted any more"
                effects.append(Send(peer, m.Refused(message.request, Refusal.CHECKPOINT.value, reason)))

    def _set_up(self, shard: ShardEntry) -> list[TrainingEffect]:
        """Tell a shard what to hold, once that is known; one that comes back, who the members are as well."""
        if self.model is None or not shard.peer or (shard.recovers and not shard.checkpoint):
            return []
        effects: list[TrainingEffect] = []
        model, facts = self.model.to_wire(), self.facts
        if shard.recovers:
            set_up = m.SetUpShard(model, self._folder(shard.checkpoint), True, facts.clock)
        else:
            set_up = m.SetUpShard(model, facts.resume)
        effects.append(Send(shard.peer, set_up))
        if shard.recovers and not shard.since:
            shard.since = self._version + 1
            self._set_members(effects)
        return effects

    def _heard(
        self, shard: ShardEntry, effects: list[TrainingEffect], ready: bool = False, error: str = "", members: int = 0
    ) -> None:
        """A shard has said how far it is, in an answer or a report."""
        served, had = shard.serves, (shard.ready, shard.members)
        if error and not shard.ready:
            if shard.recovers:
                shard.error = error
            else:
                self.setup_error = self.setup_error or f"{self.name_of(shard.process)}: {error}"
        shard.ready = shard.ready or ready
        shard.members = max(shard.members, members)
        if shard.moved and shard.serves and not served:
            moved = m.ShardMoved(shard.index, shard.term, shard.address)
            effects.extend(Send(w.peer, moved) for w in self.workers.values() if w.answered and not w.gone and w.peer)
        if error or had != (shard.ready, shard.members):
            self._welcome(effects)

    def _moved_since(self, worker: Worker, known: tuple[int, ...], effects: list[TrainingEffect]) -> None:
        """What a worker has not learned of shards that have come back."""
        for shard, epoch in zip(self.shards.values(), known, strict=False):
            if shard.moved and shard.serves and epoch < shard.term and worker.answered and not worker.gone:
                effects.append(Send(worker.peer, m.ShardMoved(shard.index, shard.term, shard.address)))

    def _report(self, shard: ShardEntry, report: dict[str, Any], effects: list[TrainingEffect]) -> None:
        check_report(report)
        replica = report.get("replica", {})
        if shard.promoting:
            if replica.get("role") == "leader":
                self._promoted(shard, replica.get("term", -1), "", effects)
            effects.extend(ask_again(shard))
        shard.replica = replica
        shard.report = report
        shard.reports += self.begun
        if not shard.address:
            shard.address, shard.pid = str(report.get("address", "")), int(report.get("pid", 0))
        in_force = report.get("members", 0)
        error = str(report.get("error") or "")
        self._heard(shard, effects, ready=bool(report.get("ready")), error=error, members=in_force)
        if shard.members < self._version and shard.ready and not shard.promoting:
            effects.append(Send(shard.peer, self._members_message()))
        effects.extend(introduce(shard, self.backups.get(shard.index)))
        self._minimiser.heard(shard.index)
        self._minimise(effects)

    def _from_backup(
        self,
        shard: ShardEntry,
        backup: Backup,
        peer: Peer,
        message: m.FromShard | m.SnapshotPart,
        effects: list[TrainingEffect],
    ) -> None:
        backup.peer = peer
        match message:
            case m.RegisterShard():
                backup.address, backup.pid = message.address, message.pid
                if self.model is not None:
                    effects.append(Send(peer, m.SetUpShard(self.model.to_wire(), "")))
            case m.ShardReady():
                backup.ready, backup.error = not message.error, message.error
            case m.ShardReport():
                check_report(message.document)
                backup.replica = message.document.get("replica", {})
                backup.ready = backup.ready or bool(message.document.get("ready"))
                if not backup.address:
                    backup.address = str(message.document.get("address", ""))
                    backup.pid = int(message.document.get("pid", 0))
                if caught_up(shard, backup):
                    effects.append(LogRow({"backup": self.name_of(backup.process), "term": shard.term}))
                    self._welcome(effects)
        effects.extend(introduce(shard, backup))

    def _promoted(self, shard: ShardEntry, term: int, error: str, effects: list[TrainingEffect]) -> None:
        """A process that has followed leads now, or says why not; the workers hear of it once it has the members."""
        if not shard.promoting or (error == "" and term != shard.term):
            return
        if error:
            shard.error = error
            return
        shard.promoting, shard.since = False, self._version + 1
        self._set_members(effects)
        effects.extend(introduce(shard, self.backups.get(shard.index)))

    # ------------------------------------------------------------ workers join

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

    def _register_worker(self, peer: Peer, message: m.RegisterWorker, effects: list[TrainingEffect]) -> None:
        worker = self.workers[message.slot]
        if message.request in worker.answers:
            self._again(worker, peer, message, effects)
            return
        if worker.gone:
            return
        model = ModelSpec.from_wire(message.model)
        worker.request, worker.pid = message.request, message.pid
        self._waiting[message.slot] = model
        if self.model is None and message.slot == 0:
            self.model = model
            for shard in self.shards.values():
                effects.extend(self._set_up(shard))
            set_up = m.SetUpShard(model.to_wire(), "")
            effects.extend(Send(b.peer, set_up) for b in self.backups.values() if b.peer)
        self._welcome(effects)

    def _welcome(self, effects: list[TrainingEffect]) -> None:
        """Answer the workers that wait: refusals at once, welcomes once the shards are ready for them."""
        if self.model is None:
            return
        for slot, model in list(self._waiting.items()):
            difference = self.model.first_difference(model)
            if difference is not None:
                self._refuse(slot, Refusal.MODEL_DIFFERS, difference, effects)
            elif self.setup_error:
                self._refuse(slot, Refusal.CHECKPOINT, self.setup_error, effects)
        if not all(s.serves for s in self.shards.values()):
            return
        if not self.begun:
            protected = self.without_backups or all(b.promotable for b in self.backups.values())
            if protected and all(w.pid or w.gone for w in self.workers.values()):
                self.begun = True
                facts = self.facts
                offset = facts.done[0][1] if facts.done and facts.done[0][0] == 0 and facts.mode.synchronous else 0
                for slot in list(self._waiting):
                    self._let_in(slot, bool(facts.resume), facts.clock, (facts.epoch, offset), effects)
            return
        if self._waiting and (not self.facts.mode.synchronous or not self._at_work()):
            self._count(self._whole(), effects)  # sync: nobody is left whose next pass they could wait for
        self._count([slot for slot in self._waiting if self.workers[slot].takes_over], effects)
        self._members_in_force(effects)

    def _at_work(self) -> bool:
        """Whether anybody has a part in what the shards do now."""
        return any((w.answered or w.takes_over) and not w.gone for w in self.workers.values())

    def _count(self, slots: Collection[int], effects: list[TrainingEffect]) -> None:
        """Workers that wait are members from now on, as they are."""
        joiners = {slot: self.workers[slot].epoch for slot in slots}
        if not joiners.items() <= self._members.items():
            self._members.update(joiners)
            self._set_members(effects)

    def _set_members(self, effects: list[TrainingEffect]) -> None:
        self._version += 1
        message = self._members_message()
        effects.extend(Send(s.peer, message) for s in self.shards.values() if s.peer and not s.promoting)

    def _members_message(self) -> m.SetMembers:
        slots = tuple(n for pair in sorted(self._members.items()) for n in pair)
        taken = tuple(s for s in sorted(self._members) if self.workers[s].takes_over)
        return m.SetMembers(self._version, slots, taken, tuple(n for numbers in self._left for n in numbers))

    def _members_in_force(self, effects: list[TrainingEffect]) -> None:
        """Once all shards know the members: let joiners in, and begin the passes that waited for it."""
        if any(s.members < self._version for s in self.shards.values()):
            return
        joining = [slot for slot in self._waiting if self._members.get(slot) == self.workers[slot].epoch]
        if not joining and not self._passes:
            return
        clock, epoch = self.clock(), self.data_position()[0]
        if self.facts.mode.synchronous:
            begun = self._data.newest_split()
            epoch = self.facts.epoch if begun is None else begun + (not self._at_work())
        for _, begin in self._passes.values():
            clock, epoch = max(clock, begin.clock), begin.epoch
        restored = all(s.report.get("initialised") for s in self.shards.values())
        others = self._data.epochs_of_others()
        for slot in joining:
            if self.workers[slot].takes_over:
                then, *position_then = self.workers[slot].start
                self._let_in(slot, restored, then, (*position_then, *others), effects)
            else:
                self._let_in(slot, restored, clock, (epoch, 0, *others), effects)
        if joining and tuple(sorted(self._members)) != self._told:
            self._tell_members(effects)
        waiting, self._passes = self._passes, {}
        for peer, begin in waiting.values():
            self._pass_begins(self.workers[begin.slot], peer, begin, effects)

    def _let_in(
        self, slot: int, restored: bool, clock: int, position: tuple[int, ...], effects: list[TrainingEffect]
    ) -> None:
        worker = self.workers[slot]
        worker.answered = True
        worker.start = (clock, *position[:2])
        del self._waiting[slot]
        slots = tuple(sorted(self._members))
        welcome = m.Welcome(worker.request, self._addresses(), restored, clock, position, slots, worker.takes_over)
        self._answer(worker, worker.peer, welcome, effects)

    def _addresses(self) -> tuple[str, ...]:
        return tuple(self.shards[i].address for i in range(self.facts.shards))

    def _refuse(self, slot: int, code: Refusal, reason: str, effects: list[TrainingEffect]) -> None:
        worker = self.workers[slot]
        del self._waiting[slot]
        self._answer(worker, worker.peer, m.Refused(worker.request, code.value, reason), effects)

    def _tell_members(self, effects: list[TrainingEffect]) -> None:
        self._told = tuple(sorted(self._members))
        notice = m.MembersChanged(self._told)
        effects.extend(Send(w.peer, notice) for w in self.workers.values() if w.answered and not w.gone and w.peer)

    # ------------------------------------------------------------ workers at work

    def _request(self, worker: Worker, peer: Peer, message: m.WorkerRequest, effects: list[TrainingEffect]) -> None:
        if message.request in worker.answers:
            self._again(worker, peer, message, effects)
            return
        if worker.gone:
            return  # what it asked for before it left
        match message:
            case m.TakeLease() | m.BeginPass() | m.EnterBarrier() if not self._leads(message.slot):
                reason = f"worker/{message.slot} is one of a replica, for which its first worker speaks"
                self._answer(worker, peer, m.Refused(message.request, Refusal.FORBIDDEN.value, reason), effects)
            case m.TakeLease():
                if min(message.loader, message.epoch, message.total, message.unit, *message.done) < 0:
                    raise ProtocolError("a lease of a negative number of samples")
                lease = self._data.take(message, sum(map(self._leads, self._members)))
                if isinstance(lease, str):
                    answer: Message = m.Refused(message.request, Refusal.DATA_DIFFERS.value, lease)
                else:
                    answer = m.Lease(message.request, *lease)
                self._answer(worker, peer, answer, effects)
            case m.LogMetrics():
                numbers = {k: float(v) for k, v in message.values.items() if isinstance(v, (int, float))}
                self.latest.update(numbers)
                effects.append(LogRow({**numbers, "worker": message.slot, "clock": message.clock}))
                self._answer(worker, peer, m.Ack(message.request, 0), effects)
            case m.Spans():
                effects.append(StoreSpans(peer, message))
            case m.EnterBarrier() if worker.takes_over and worker.begun < 0 <= worker.former:
                # It comes through the beginning of the script, where all have been together before.
                self._answer(worker, peer, m.Ack(message.request, 0), effects)
            case m.EnterBarrier():
                worker.answers[message.request] = None
                self._barriers.enter(message.name, message.slot, peer, message.request)
                self._release_barriers(effects)
            case m.BeginPass():
                self._begin_pass(worker, peer, message, effects)
            case m.Agree():
                self._agree(peer, message, effects)
            case m.TakePortion():
                self._minimiser.asked(worker.slot, peer, message, len(self._members))
                self._minimise(effects)
            case m.EndTraining():
                self._answer(worker, peer, m.Ack(message.request, 0), effects)
                self._end_training(message, effects)
            case m.Goodbye():
                self._answer(worker, peer, m.Ack(message.request, 0), effects)
                worker.drained, worker.finished = message.drained, not message.drained
                self.torn += max(0, message.torn) if self._leads(message.slot) else 0
                if message.done >= 0:
                    self._left.append((message.slot, message.worker_epoch, message.first, message.done))
                self.worker_gone(message.slot, effects, done=not message.drained)
                if any(s.recovers for s in self.shards.values()):
                    self._set_members(effects)  # one that has come back may not know that it left
            case _:
                raise ProtocolError(f"the coordinator does not take {type(message).__name__}")

    def _minimise(self, effects: list[TrainingEffect]) -> None:
        """Send what mode lbfgs has to say."""
        found = self._minimiser
        for slot, peer, answer in found.answers:
            self._answer(self.workers[slot], peer, answer, effects)
        effects.extend(Send(self.workers[slot].peer, notice) for slot, notice in found.notices)
        if found.command is not None:
            shards = [self.shards[i] for i in found.commands]
            effects.extend(Send(shard.peer, found.command) for shard in shards if shard.peer)
        effects.extend(LogRow(row) for row in found.rows)
        self.latest.update(found.latest())
        found.said()

    def _end_training(self, message: m.EndTraining, effects: list[TrainingEffect]) -> None:
        """The first reason counts."""
        if not self.done_because:
            self.done_because = message.reason[:REASON_CHARACTERS] or "done"
            effects.append(LogRow({"ends": self.done_because, "worker": message.slot, "clock": message.clock}))
        told = m.ShouldStop(self.done_because, by_script=True)
        effects.extend(Send(w.peer, told) for w in self.workers.values() if w.answered and w.peer and not w.gone)

    def _agree(self, peer: Peer, message: m.Agree, effects: list[TrainingEffect]) -> None:
        """Not among a worker's answers: a repeat finds the value where the first asker did."""
        if message.proposes:
            for other, request in self._agreements.propose(message.key, message.value).values():
                effects.append(Send(other, m.Agreed(request, self._agreements.values[message.key])))
        if message.key in self._agreements.values:
            effects.append(Send(peer, m.Agreed(message.request, self._agreements.values[message.key])))
        else:
            self._agreements.wait(message.key, message.slot, peer, message.request)
            self._nobody_to_wait_for(effects)

    def _nobody_to_wait_for(self, effects: list[TrainingEffect]) -> None:
        """Those who wait for worker 0's first steps go on if it takes no more."""
        first = [worker for slot, worker in self.workers.items() if slot < self.facts.ranks]
        if self._agreements.awaited(WARM_START) and all(worker.gone for worker in first):
            for peer, request in self._agreements.propose(WARM_START, b"gone").values():
                effects.append(Send(peer, m.Agreed(request, self._agreements.values[WARM_START])))

    def _begin_pass(self, worker: Worker, peer: Peer, begin: m.BeginPass, effects: list[TrainingEffect]) -> None:
        """The first worker that begins a training pass has left the one before on all shards, so has everybody:
        the moment at which others may join. With a negative clock a worker announces that it leaves, and only asks
        whether it has a part of a pass that is split already."""
        if begin.clock < 0:
            worker.leaving = True
            slots = self._data.splits.get((begin.loader, begin.epoch), [])
            part = (len(slots), slots.index(begin.slot)) if begin.slot in slots else (0, 0)
            self._answer(worker, peer, m.PassBegins(begin.request, *part), effects)
            return
        if begin.loader == 0 and begin.epoch > worker.begun:
            worker.begun = begin.epoch
            self._release_barriers(effects)
        fresh = begin.loader == 0 and (0, begin.epoch) not in self._data.splits
        if fresh and self._waiting:
            self._count(self._whole(), effects)
        if fresh and any(s.members < self._version for s in self.shards.values()):
            worker.answers[begin.request] = None
            self._passes[begin.slot] = (peer, begin)
        else:
            self._pass_begins(worker, peer, begin, effects)

    def _pass_begins(self, worker: Worker, peer: Peer, begin: m.BeginPass, effects: list[TrainingEffect]) -> None:
        self._clock = max(self._clock, begin.clock)
        # Who has finished still counts: when its last word comes must not decide how others' samples are split.
        finished = {w.slot for w in self.workers.values() if w.finished}
        staying = {slot for slot in self._members if slot == begin.slot or not self.workers[slot].leaving}
        workers, index = self._data.split(begin, sorted(filter(self._leads, staying | finished)))
        self._answer(worker, peer, m.PassBegins(begin.request, workers, index), effects)

    def _release_barriers(self, effects: list[TrainingEffect]) -> None:
        leads = [w for w in self.workers.values() if self._leads(w.slot) and not w.gone]
        live = {w.slot for w in leads if w.answered or w.takes_over or not self.begun}
        for slot, (peer, request) in self._barriers.opened(live, self._past):
            self._answer(self.workers[slot], peer, m.Ack(request, 0), effects)

    def _past(self, slot: int, entered: Collection[int]) -> bool:
        """Whether a worker that has taken over has begun behind a barrier: it is in a later pass than those in it."""
        worker = self.workers[slot]
        return worker.takes_over and worker.begun > max((self.workers[s].begun for s in entered), default=worker.begun)

    def _answer(self, worker: Worker, peer: Peer, answer: Any, effects: list[TrainingEffect]) -> None:
        worker.answers[answer.request] = answer
        while len(worker.answers) > ANSWERS_KEPT:
            del worker.answers[next(iter(worker.answers))]
        effects.append(Send(peer, answer))

    def _again(self, worker: Worker, peer: Peer, message: m.WorkerRequest, effects: list[TrainingEffect]) -> None:
        """A repeat: the same answer, or, while there is none yet, a new address for it."""
        answer = worker.answers[message.request]
        if isinstance(answer, m.Welcome):
            if not all(s.serves for s in self.shards.values()):
                return  # it will ask again
            answer = replace(answer, shards=self._addresses())  # a shard may have moved since
        if answer is not None:
            effects.append(Send(peer, answer))
        elif isinstance(message, m.EnterBarrier):
            self._barriers.asked_again(message.name, message.slot, peer, message.request)
        elif isinstance(message, m.BeginPass) and message.slot in self._passes:
            self._passes[message.slot] = (peer, message)

    # ------------------------------------------------------------ snapshots

    def _clock_ahead(self) -> int:
        """A clock that no shard should have reached when the request arrives.

        It is a few reports' pace away, and farther after each attempt that came too late.
        """
        clocks = [s.report.get("round", 0) for s in self.shards.values()]
        pace = max((s.report.get("rounds_per_report", 0) for s in self.shards.values()), default=0)
        return int(max(clocks, default=0) + 3 * pace + self._margin)

    def _manifest(self) -> dict[str, Any]:
        assert self.model is not None
        facts = self.facts
        epoch, done = self.data_position()
        return {
            "format": 1,
            "job": facts.job,
            "mode": str(facts.mode),
            "seed": facts.seed,
            "clock": self.clock(),
            "shards": facts.shards,
            "chunk_bytes": facts.chunk_bytes,
            "model": self.model.to_wire(),
            "data": {"epoch": epoch, "done": [list(span) for span in merge(done)]},
            "synchronous": facts.mode.synchronous,
        }

    # ------------------------------------------------------------ durability

    def document(self) -> dict[str, Any]:
        """All that must survive the process, but for the model, as plain values. A snapshot under way does not."""
        return {
            "facts": self.facts.document(),
            "workers": [w.document() for w in self.workers.values()],
            "shards": [s.document() for s in self.shards.values()],
            "backups": [[index, b.document()] for index, b in self.backups.items()],
            "without_backups": self.without_backups,
            "failures": [asdict(f) for f in self.failures],
            "setup_error": self.setup_error,
            "latest": self.latest,
            "torn": self.torn,
            "done_because": self.done_because,
            "begun": self.begun,
            "data": self._data.document(),
            "barriers": self._barriers.document(),
            "agreed": self._agreements.document(),
            "minimiser": self._minimiser.document(),
            "passes": [asdict(begin) for _, begin in self._passes.values()],
            "version": self._version,
            "members": list(self._members.items()),
            "told": self._told,
            "margin": self._margin,
            "clock": self._clock,
            "former": [asdict(p) for p in self.former],
            "left": self._left,
        }

    @classmethod
    def from_document(
        cls, document: dict[str, Any], model: ModelSpec | None, folder: Callable[[int], str] = str
    ) -> Training:
        """The inverse of :meth:`document`. Workers that waited for a welcome will ask again."""
        self = cls(JobFacts.from_document(document["facts"]), folder)
        self.model = model
        self.workers = {d["slot"]: Worker.from_document(d) for d in document["workers"]}
        self.shards = {d["index"]: ShardEntry.from_document(d) for d in document["shards"]}
        self.backups = {index: Backup(**d) for index, d in document["backups"]}
        self.without_backups = document["without_backups"]
        self.failures = [m.ReportFailure(**f) for f in document["failures"]]
        self.setup_error, self.latest = document["setup_error"], document["latest"]
        self.torn, self.begun = document["torn"], document["begun"]
        self.done_because = document.get("done_because", "")
        self._data = DataState.from_document(document["data"])
        self._barriers = Barriers.from_document(document["barriers"])
        self._agreements = Agreements.from_document(document.get("agreed", []))
        self._minimiser.restore(document.get("minimiser", {}))
        self._passes = {b["slot"]: (b"", m.BeginPass(**b)) for b in document["passes"]}
        self._version, self._members = document["version"], dict(document["members"])
        self._told = tuple(document["told"])
        self._margin, self._clock = document["margin"], document["clock"]
        self.former = [progress_from(p) for p in document["former"]]
        self._left = [(slot, epoch, first, done) for slot, epoch, first, done in document["left"]]
        return self
