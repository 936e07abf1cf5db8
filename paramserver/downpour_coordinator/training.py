"""The training of one job, as its coordinator sees it: who has joined, whose samples are whose, barriers, snapshots.

A state machine: messages in, effects out. No sockets, no clock, no files. It survives a restart of its process
through :meth:`Training.document`: senders repeat what was not answered, an answer is given again to a repeat, and
where a sender can be reached now follows from what it sent last.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.transport import Peer
from downpour_coordinator.data import DataState
from downpour_coordinator.effects import LogRow, Send, StorePart, TrainingEffect
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.leases import Span, merge
from downpour_coordinator.participants import ShardEntry, Worker
from downpour_coordinator.reports import check_report, check_snapshot
from downpour_coordinator.snapshots import Round, SnapshotFailed

LEAST_MARGIN, LARGEST_MARGIN = 2, 4096
"""Clocks that a synchronous snapshot is put ahead of where the shards are expected to be when the request arrives."""
REPORTS_NEEDED = 2
"""Reports of each shard, from the beginning of the training on, that tell its pace."""
ANSWERS_KEPT = 64
"""Answers remembered per worker, for repeats of its requests."""


class Training:
    """State of one job; see the module. ``failures`` collects what scripts reported, the first first."""

    def __init__(self, facts: JobFacts) -> None:
        self.facts = facts
        self.workers = {slot: Worker(slot) for slot in range(facts.workers)}
        self.shards = {index: ShardEntry(index) for index in range(facts.shards)}
        self.failures: list[m.ReportFailure] = []
        self.setup_error = ""
        self.latest: dict[str, float] = {}
        self.torn = 0
        self.former: list[m.Progress] = []
        """the last words of workers whose slots others have now"""
        self.model: ModelSpec | None = None
        self.begun = False
        """Whether the first workers have been welcomed together."""
        self._waiting: dict[int, ModelSpec] = {}
        self._data = DataState(facts.epoch, facts.done if facts.resume else ())
        self._barriers: dict[str, dict[int, tuple[Peer, int]]] = {}
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
        if not self.begun:
            self._members[slot] = epoch
        self._waiting.pop(slot, None)

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
        for entered in self._barriers.values():
            entered.pop(slot, None)
        self._data.release(slot)
        self._release_barriers(effects)
        self._welcome(effects)
        if self.begun and not done:
            self._tell_members(effects)

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
        """Whether enough is known to choose a clock for a synchronous snapshot well."""
        return not self.facts.mode.synchronous or all(s.reports >= REPORTS_NEEDED for s in self.shards.values())

    def begin_snapshot(self, number: int, folder: str, final: bool = False) -> list[TrainingEffect]:
        """Ask every shard for a snapshot; nothing while one is under way or the model is unknown.

        In the synchronous mode all shards take it at one clock a little ahead of what the workers reported last.
        """
        if self.model is None or not all(s.ready for s in self.shards.values()):
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
        return [Send(s.peer, m.StopShard()) for s in self.shards.values() if s.peer]

    # ------------------------------------------------------------ what it knows

    @property
    def training(self) -> bool:
        """Whether the job has begun and every worker that has not gone is in it."""
        return self.begun and all(w.answered or w.gone for w in self.workers.values())

    def waiting_for(self) -> list[str]:
        """The processes that are still to join, by name."""
        missing = [f"server/{s.index}" for s in self.shards.values() if not s.address]
        missing += [f"worker/{w.slot}" for w in self.workers.values() if not w.pid and not w.gone]
        return missing

    def live(self) -> list[int]:
        """Slots of the workers that train, ascending."""
        return sorted(w.slot for w in self.workers.values() if w.answered and not w.gone)

    def staleness(self) -> Counter[int]:
        """Contributions by staleness, over all shards."""
        total: Counter[int] = Counter()
        for shard in self.shards.values():
            total.update({int(k): n for k, n in shard.report.get("staleness", {}).items()})
        return total

    def clock(self) -> int:
        """The largest clock that a worker has reported."""
        return max([self._clock, *(w.progress.clock for w in self.workers.values() if w.progress)])

    def torn_samples(self) -> int:
        """Samples that left with a worker in the middle of a pass and that nobody has trained, so far."""
        return self.torn + self._data.returned()

    def data_position(self) -> tuple[int, list[Span]]:
        """The pass over the first loader that the last worker is in, and what of it is done."""
        finished = [w.progress.epoch for w in self.workers.values() if w.progress is not None]
        return self._data.position((w.slot for w in self.workers.values() if not w.gone), finished)

    # ------------------------------------------------------------ shards

    def _from_shard(self, peer: Peer, message: m.FromShard | m.SnapshotPart, effects: list[TrainingEffect]) -> None:
        shard = self.shards.get(message.shard)
        if shard is None or message.job != self.facts.job:
            raise ProtocolError(f"there is no server/{message.shard} of {message.job} here")
        if message.shard_epoch != self.facts.shard_epoch:
            return  # of a process that is being ended
        shard.peer = peer
        match message:
            case m.RegisterShard():
                shard.address, shard.pid = message.address, message.pid
                if self.model is not None:
                    effects.append(Send(peer, m.SetUpShard(self.model.to_wire(), self.facts.resume)))
            case m.ShardReady():
                if message.error:
                    self.setup_error = self.setup_error or f"server/{message.shard}: {message.error}"
                else:
                    shard.ready = True
                self._welcome(effects)
            case m.ShardReport():
                self._report(shard, message.document, effects)
            case m.MembersSet():
                shard.members = max(shard.members, message.version)
                self._welcome(effects)
            case m.SnapshotTaken():
                if not message.error:
                    check_snapshot(message.document, message.shard)
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

    def _report(self, shard: ShardEntry, report: dict[str, Any], effects: list[TrainingEffect]) -> None:
        check_report(report)
        shard.report = report
        shard.reports += self.begun
        if not shard.address:
            shard.address, shard.pid = str(report.get("address", "")), int(report.get("pid", 0))
        if report.get("error") and not shard.ready:
            self.setup_error = self.setup_error or f"server/{shard.index}: {report['error']}"
            self._welcome(effects)
        elif report.get("ready") and not shard.ready:
            shard.ready = True
            self._welcome(effects)
        in_force = report.get("members", shard.members)
        if type(in_force) is int and in_force > shard.members:
            shard.members = in_force
            self._welcome(effects)
        elif shard.members < self._version and shard.ready:
            effects.append(Send(shard.peer, self._members_message()))

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
                if shard.peer:
                    effects.append(Send(shard.peer, m.SetUpShard(message.model, self.facts.resume)))
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
        if not all(s.ready for s in self.shards.values()):
            return
        if not self.begun:
            if all(w.pid or w.gone for w in self.workers.values()):
                self.begun = True
                facts = self.facts
                offset = facts.done[0][1] if facts.done and facts.done[0][0] == 0 and facts.mode.synchronous else 0
                for slot in list(self._waiting):
                    self._let_in(slot, bool(facts.resume), facts.clock, (facts.epoch, offset), effects)
            return
        if self._waiting and (not self.facts.mode.synchronous or not self.live()):
            self._count_joiners(effects)  # sync: nobody is left whose next pass they could wait for
        self._members_in_force(effects)

    def _count_joiners(self, effects: list[TrainingEffect]) -> None:
        joiners = {slot: self.workers[slot].epoch for slot in self._waiting}
        if not joiners.items() <= self._members.items():
            self._members.update(joiners)
            self._set_members(effects)

    def _set_members(self, effects: list[TrainingEffect]) -> None:
        self._version += 1
        message = self._members_message()
        effects.extend(Send(s.peer, message) for s in self.shards.values() if s.peer)

    def _members_message(self) -> m.SetMembers:
        return m.SetMembers(self._version, tuple(n for pair in sorted(self._members.items()) for n in pair))

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
            epoch = self.facts.epoch if begun is None else begun + (not self.live())
        for _, begin in self._passes.values():
            clock, epoch = max(clock, begin.clock), begin.epoch
        restored = all(s.report.get("initialised") for s in self.shards.values())
        position = (epoch, 0, *self._data.epochs_of_others())
        for slot in joining:
            self._let_in(slot, restored, clock, position, effects)
        if joining:
            self._tell_members(effects)
        waiting, self._passes = self._passes, {}
        for peer, begin in waiting.values():
            self._pass_begins(self.workers[begin.slot], peer, begin, effects)

    def _let_in(
        self, slot: int, restored: bool, clock: int, position: tuple[int, ...], effects: list[TrainingEffect]
    ) -> None:
        worker = self.workers[slot]
        worker.answered = True
        del self._waiting[slot]
        addresses = tuple(self.shards[i].address for i in range(self.facts.shards))
        slots = tuple(sorted(self._members))
        welcome = m.Welcome(worker.request, addresses, restored, clock, position, slots)
        self._answer(worker, worker.peer, welcome, effects)

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
            case m.TakeLease():
                if min(message.loader, message.epoch, message.total, message.unit, *message.done) < 0:
                    raise ProtocolError("a lease of a negative number of samples")
                lease = self._data.take(message, len(self._members))
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
            case m.EnterBarrier():
                worker.answers[message.request] = None
                self._barriers.setdefault(message.name, {})[message.slot] = (peer, message.request)
                self._release_barriers(effects)
            case m.BeginPass():
                self._begin_pass(worker, peer, message, effects)
            case m.Goodbye():
                self._answer(worker, peer, m.Ack(message.request, 0), effects)
                worker.drained, worker.finished = message.drained, not message.drained
                self.torn += max(0, message.torn)
                self.worker_gone(message.slot, effects, done=not message.drained)
            case _:
                raise ProtocolError(f"the coordinator does not take {type(message).__name__}")

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
        fresh = begin.loader == 0 and (0, begin.epoch) not in self._data.splits
        if fresh and self._waiting:
            self._count_joiners(effects)
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
        workers, index = self._data.split(begin, sorted(staying | finished))
        self._answer(worker, peer, m.PassBegins(begin.request, workers, index), effects)

    def _release_barriers(self, effects: list[TrainingEffect]) -> None:
        live = {w.slot for w in self.workers.values() if not w.gone and (w.answered or not self.begun)}
        for name, entered in list(self._barriers.items()):
            if live <= set(entered):
                for slot, (peer, request) in entered.items():
                    self._answer(self.workers[slot], peer, m.Ack(request, 0), effects)
                del self._barriers[name]

    def _answer(self, worker: Worker, peer: Peer, answer: Any, effects: list[TrainingEffect]) -> None:
        worker.answers[answer.request] = answer
        while len(worker.answers) > ANSWERS_KEPT:
            del worker.answers[next(iter(worker.answers))]
        effects.append(Send(peer, answer))

    def _again(self, worker: Worker, peer: Peer, message: m.WorkerRequest, effects: list[TrainingEffect]) -> None:
        """A repeat: the same answer, or, while there is none yet, a new address for it."""
        answer = worker.answers[message.request]
        if answer is not None:
            effects.append(Send(peer, answer))
        elif isinstance(message, m.EnterBarrier) and message.slot in self._barriers.get(message.name, {}):
            self._barriers[message.name][message.slot] = (peer, message.request)
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
            "failures": [asdict(f) for f in self.failures],
            "setup_error": self.setup_error,
            "latest": self.latest,
            "torn": self.torn,
            "begun": self.begun,
            "data": self._data.document(),
            "barriers": [[name, [[s, r] for s, (_, r) in e.items()]] for name, e in self._barriers.items()],
            "passes": [asdict(begin) for _, begin in self._passes.values()],
            "version": self._version,
            "members": list(self._members.items()),
            "told": self._told,
            "margin": self._margin,
            "clock": self._clock,
            "former": [asdict(p) for p in self.former],
        }

    @classmethod
    def from_document(cls, document: dict[str, Any], model: ModelSpec | None) -> Training:
        """The inverse of :meth:`document`. Workers that waited for a welcome will ask again."""
        self = cls(JobFacts.from_document(document["facts"]))
        self.model = model
        self.workers = {d["slot"]: Worker.from_document(d) for d in document["workers"]}
        self.shards = {d[0]: ShardEntry.from_document(d) for d in document["shards"]}
        self.failures = [m.ReportFailure(**f) for f in document["failures"]]
        self.setup_error, self.latest = document["setup_error"], document["latest"]
        self.torn, self.begun = document["torn"], document["begun"]
        self._data = DataState.from_document(document["data"])
        self._barriers = {name: {s: (b"", r) for s, r in entered} for name, entered in document["barriers"]}
        self._passes = {b["slot"]: (b"", m.BeginPass(**b)) for b in document["passes"]}
        self._version, self._members = document["version"], dict(document["members"])
        self._told = tuple(document["told"])
        self._margin, self._clock = document["margin"], document["clock"]
        self.former = [m.Progress(**p) for p in document["former"]]
        return self
