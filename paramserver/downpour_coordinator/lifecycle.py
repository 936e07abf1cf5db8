"""A job's life, from waiting for a place to its end: which processes there should be, checkpoints, what an end means.

A state machine around :class:`Training`: events in, effects out; no sockets, no clock, no files. Whoever carries it
(``downpour run`` with its children, the coordinator with its agents) starts what is ``pending``, ends what is to
``stop``, and says what became of it. Times are seconds of any clock, compared only with themselves.

::

    QUEUED → STARTING → TRAINING → SAVING → EXPORTING → CLOSING → ENDING → OVER
                            ↓ interrupted   ↑                        ↓ restarts left, or changed
                         KEEPING → LEAVING ─┘                     WAITING → STARTING
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from downpour_common import messages as m
from downpour_common.config import JobSpec
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message
from downpour_common.replicas import multiple_of_ranks
from downpour_common.transport import Peer
from downpour_coordinator import beginnings, ending, running, shard_ends, standing, worker_ends
from downpour_coordinator.changes import Changes
from downpour_coordinator.checkpointing import Checkpointing
from downpour_coordinator.effects import Effect, LogRow
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.lifecycle_document import document_of, restore
from downpour_coordinator.phases import MEASURED, REPLICATED, Phase
from downpour_coordinator.processes import Failure, Key, Process
from downpour_coordinator.recorder import Recorder
from downpour_coordinator.recovery import Signs
from downpour_coordinator.roster import Roster
from downpour_coordinator.snapshots import CommitSnapshot
from downpour_coordinator.standby import Standby
from downpour_coordinator.training import Training


class Lifecycle:
    """One job. ``base`` is put before ``checkpoints/NNNNNN``: its run directory with a slash, or "" in a cluster.

    Its work of each phase stands in :mod:`running`, :mod:`ending` and :mod:`beginnings`, that of processes which end in
    :mod:`worker_ends` and :mod:`shard_ends`: functions that alone may use what begins with an underscore here.
    """

    def __init__(self, job: str, spec: JobSpec, facts: JobFacts, base: str, snapshots: int = 0) -> None:
        self.job, self.spec = job, spec
        self.origin = facts
        """where it began, and begins again if it has no sound checkpoint of its own"""
        self.phase = Phase.QUEUED
        self.roster = Roster(spec.ranks)
        settings = spec.settings
        self.checkpoints = Checkpointing(
            base, snapshots, settings.checkpoint_s, settings.keep_checkpoints, settings.mtbf_s
        )
        self.training = Training(facts, self.checkpoints.folder)
        self.changes = Changes()
        self.failure: Failure | None = None
        self.restarts = 0
        self.last_failure: Failure | None = None
        self.interrupted = ""
        """why the job was asked to end, or "" """
        self.warnings: list[str] = []
        self.model = ""
        self.begun_s: float | None = None
        self.first_step_s: float | None = None
        self.trained_s: float | None = None
        self.wanted = spec.workers
        self.fewest = spec.fewest_workers
        self.recorder = Recorder(spec)
        self._keep = self._kept = self._hurry = False
        self._to_tell = ""
        self._told_s = -ending.TELL_S
        self._ended_well = False
        self._since_s = 0.0
        self._now_s = 0.0
        self._signs = Signs()
        self.standby = Standby(self.roster, self._signs, self.warnings)
        self._asked_s = float("-inf")
        self._sought_s = float("-inf")
        self._trains_s: float | None = None
        """since when, this time"""
        self._floor = self._newest = snapshots
        """checkpoints after the first one are of this run, the other is the newest of all"""
        self._committing = 0
        """number of the snapshot whose manifest is being written"""
        self._lost_host = ("", 0.0)
        """that was lost last with processes, and when"""
        self._begun_again = 0
        """how often in a row the whole job has begun again soon"""
        self._non_finite: dict[int, int] = {}
        """contributions with NaN or Inf by slot that have had their consequences"""
        self._awaited = 0
        """number of the snapshot that the phase waits for"""
        self._committed = False
        self._saves = 1
        """attempts of this phase"""

    # ------------------------------------------------------------ what it is

    @property
    def state(self) -> str:
        """The job's state, for people."""
        return standing.state(self)

    @property
    def reason(self) -> str:
        """Why it is in this state, one word; see docs/cluster.md."""
        return standing.reason(self)

    @property
    def processes(self) -> dict[Key, Process]:
        """By (role, index)."""
        return self.roster.all

    @property
    def degraded(self) -> str:
        """What goes wrong without ending the job, or ""."""
        return standing.degraded(self)

    @property
    def remarks(self) -> list[str]:
        """The warnings, and what is counted: pushes that were lost, contributions that were left out."""
        return standing.remarks(self)

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.phase is Phase.OVER

    def waiting_for(self) -> list[str]:
        """What the job waits for at its start: processes without a place, not joined, or a model not taken."""
        return standing.waiting_for(self)

    def waited_s(self, now_s: float) -> float:
        """Time spent in this phase."""
        return now_s - self._since_s

    def pending(self) -> list[Process]:
        """Processes that need a place, shards first."""
        if self.phase not in (Phase.STARTING, Phase.TRAINING, Phase.SAVING):
            return []
        found = [p for p in self.roster.pending() if self._may_start(p)]
        # Nobody waits behind a backup that finds no place.
        return sorted(found, key=lambda p: p.role == "server" and self.training.follows(p.index))

    def _may_start(self, process: Process) -> bool:
        if process.wait_s and process.waited_s(self._now_s) < 0.0:
            return False
        if process.role == "worker":
            return self.phase is not Phase.SAVING
        if self.training.follows(process.index):
            return self.phase is not Phase.SAVING
        shard = self.training.shards[process.index % self.spec.shards]
        # Elsewhere its file must be brought there first; here it may start meanwhile.
        return not shard.recovers or bool(shard.checkpoint or self.checkpoints.base)

    def stopping(self) -> list[Process]:
        """Processes that are to end and have not yet."""
        return self.roster.stopping()

    # ------------------------------------------------------------ events

    def begin(self, now_s: float, workers: int | None = None) -> list[Effect]:
        """Leave the queue: the processes are wanted from now on, ``workers`` of them at first if not all."""
        self._now_s = now_s
        self.begun_s = now_s if self.begun_s is None else self.begun_s
        first = self.wanted if workers is None else workers
        facts = replace(self.training.facts, workers=first, shard_epoch=self.restarts)
        self.training = self.training.anew(facts)
        self._non_finite = {}
        self._populate(now_s)
        return []

    def placed(self, role: str, index: int, node: str, now_s: float) -> None:
        """A pending process has its place; whoever placed it sees that it starts."""
        process = self.processes[role, index]
        process.state, process.node, process.since_s = "started", node, now_s
        if self.phase is Phase.STARTING:
            self._since_s = now_s

    def handle(self, peer: Peer, message: Message, now_s: float) -> list[Effect]:
        """A message of one of the job's processes. Raises :class:`ProtocolError` for nonsense."""
        if self.phase in (Phase.QUEUED, Phase.WAITING, Phase.OVER):
            raise ProtocolError(f"job {self.job} has no processes now")
        self._now_s = now_s
        if isinstance(message, m.RegisterWorker) and self.phase not in (Phase.STARTING, Phase.TRAINING):
            return self._advance(now_s, [])  # too late
        effects: list[Effect] = list(self.training.handle(peer, message))
        if isinstance(message, m.LogMetrics):
            rows = [effect for effect in effects if isinstance(effect, LogRow)]
            effects += self.recorder.logged(rows, self.training, self.train_s(now_s))
        match message:
            case m.FromShard():
                self._signs.heard(("server", message.shard), message.shard_epoch, now_s)
            case m.WorkerNotice() | m.WorkerRequest():
                self._signs.heard(("worker", message.slot), message.worker_epoch, now_s)
        if isinstance(message, m.RegisterWorker):
            self._runs(("worker", message.slot), message.worker_epoch, message.pid)
        if isinstance(message, m.RegisterShard):
            self._runs(("server", message.shard), message.shard_epoch, message.pid)
        for effect in effects:
            if isinstance(effect, CommitSnapshot):
                self._committed |= effect.number == self._awaited
                self._committing = effect.number
                hosts = {s.index: self.processes["server", s.process].node for s in self.training.shards.values()}
                self.checkpoints.measured(effect.manifest["files"], hosts)
        return self._advance(now_s, effects)

    def _runs(self, key: Key, epoch: int, pid: int) -> None:
        process = self.processes.get(key)
        if process is not None and process.epoch == epoch:
            process.pid = pid

    def ended(
        self,
        key: Key,
        epoch: int,
        code: int | None,
        now_s: float,
        tail: tuple[str, ...] = (),
        error: str = "",
    ) -> list[Effect]:
        """A process has ended with ``code``, could not be started, or was lost with its host (``code`` None)."""
        process = self.processes.get(key)
        effects: list[Effect] = []
        if process is None or process.epoch != epoch or process.state == "ended":
            return effects
        process.state, process.code, process.tail, process.error = "ended", code, tail, error
        if process.role == "server":
            shard_ends.judge_shard(self, process, now_s, effects)
        elif self.phase in (Phase.STARTING, Phase.TRAINING):
            worker_ends.judge_worker(self, process, now_s, effects)
        return self._advance(now_s, effects)

    def tick(self, now_s: float) -> list[Effect]:
        """Time passes; call it a few times per second."""
        self._signs.listening(now_s)
        effects: list[Effect] = []
        if self.phase in MEASURED and self.first_step_s is not None:
            over = self.phase is not Phase.TRAINING
            effects += self.recorder.row(self.training, self.train_s(now_s), over)
        return self._advance(now_s, effects)

    def train_s(self, now_s: float) -> float:
        """Time since the first step, or that it took."""
        return (self.trained_s or now_s) - self.first_step_s if self.first_step_s is not None else 0.0

    def counted_s(self, now_s: float) -> float:
        """As :meth:`train_s`, since all of the job last began together: what steps and samples are counted from."""
        return self.train_s(now_s) if self._trains_s is None else (self.trained_s or now_s) - self._trains_s

    def stop(self, reason: str, keep: bool, now_s: float) -> list[Effect]:
        """End the job; ``keep``: with a checkpoint of where it is. A second time: end everything at once."""
        effects: list[Effect] = []
        if self.phase is Phase.OVER:
            return effects
        if self.interrupted and keep:
            self._hurry = True
        self.interrupted = self.interrupted or reason
        if self.phase in (Phase.QUEUED, Phase.WAITING):
            self._enter(Phase.OVER, now_s)
            return effects
        if self.phase in (Phase.STARTING, Phase.TRAINING):
            self._keep = keep and self.phase is Phase.TRAINING
            if keep and self.phase is Phase.STARTING:
                self.warnings.append("no checkpoint was made at the interruption: training had not begun")
            if self._keep:
                effects.extend(self.training.ask_to_stop(reason.lower()))
            else:
                self._to_tell = reason.lower()
            self._enter(Phase.KEEPING if self._keep else Phase.LEAVING, now_s)
        elif not keep and self.phase in (Phase.SAVING, Phase.EXPORTING, Phase.KEEPING):
            self._enter(Phase.LEAVING, now_s)
        return self._advance(now_s, effects)

    def snapshot_done(self, number: int, error: str, now_s: float) -> list[Effect]:
        """A snapshot was committed, or why not."""
        effects: list[Effect] = []
        self._committing = 0 if self._committing == number else self._committing
        self._newest = self._newest if error else max(self._newest, number)
        self.checkpoints.done(number, error, now_s, effects)
        if number == self._awaited:
            ending.snapshot_over(self, error, now_s, effects)
        return self._advance(now_s, effects)

    def exported(self, path: str, error: str, now_s: float) -> list[Effect]:
        """``model.safetensors`` is written, or why not."""
        if self.phase is Phase.EXPORTING:
            self.model = path
            if error:
                ending.result_lost(self, error)
            else:
                self._ended_well = True
            self._enter(Phase.LEAVING, now_s)
        return self._advance(now_s, [])

    def checkpoint_found(self, facts: JobFacts, now_s: float) -> list[Effect]:
        """What a restart goes on from (asked for by :class:`FindCheckpoint`); the job queues for its places again."""
        if self.phase is Phase.WAITING:
            self.training = self.training.anew(facts)
            self._enter(Phase.QUEUED, now_s)
        return self._advance(now_s, [])

    def shard_checkpoint_found(
        self, number: int, shards: tuple[int, ...], skipped: tuple[str, ...], now_s: float
    ) -> list[Effect]:
        """The checkpoint that these shards come back from, 0 if there is none (asked for by
        :class:`FindShardCheckpoint`); ``skipped``: what is wrong with newer ones."""
        effects: list[Effect] = []
        waiting = [i for i in shards if self.training.shards[i].recovers and not self.training.shards[i].checkpoint]
        if waiting and self.phase in (Phase.TRAINING, Phase.SAVING):
            self.warnings += [f"skipped a damaged checkpoint: {text}" for text in skipped]
            if number:
                for index in waiting:
                    effects += self.training.shard_resumes(index, number)
            elif self.last_failure is not None:
                self._begin_again(self.last_failure, now_s, paid=True)
        return self._advance(now_s, effects)

    def checkpoint_now(self, token: str) -> dict[str, Any]:
        """Have a checkpoint begin now, once per ``token``; how far it is: ``state`` is waiting, writing, committed or
        failed. Raises :class:`ConfigError` where there is nothing to keep."""
        if len(token) > 64:
            raise ConfigError("the wish for a checkpoint has a token of at most 64 characters")
        if self.phase is not Phase.TRAINING and not self.checkpoints.knows(token):
            raise ConfigError(f"job {self.job} is {self.state}; only a running job can be asked for a checkpoint")
        wish = self.checkpoints.wish(token)
        state = "committed" if wish.committed else "failed" if self.over else "writing" if wish.number else "waiting"
        error = wish.error or ("the job has ended before it" if state == "failed" else "")
        return {"job": self.job, "state": state, "number": wish.number, "error": error}

    def change(self, token: str, assignments: Iterable[str]) -> dict[str, Any]:
        """Go on with another description, once per ``token``: see :mod:`downpour_coordinator.changes`; how far it is.
        Raises :class:`ConfigError` where it cannot be."""
        if not self.changes.knows(token):
            if self.phase is not Phase.TRAINING:
                raise ConfigError(f"job {self.job} is {self.state}; only a running job can be changed")
            self.changes.ask(token, self.spec, assignments)
        state, error = self.changes.progress(token, self.over)
        number = self.changes.number if token == self.changes.token else 0
        return {"job": self.job, "state": state, "number": number, "error": error, "mode": self.spec.mode}

    def scale(self, workers: int, now_s: float) -> list[Effect]:
        """Have this many workers while training goes on. Raises :class:`ConfigError`."""
        if self.phase is not Phase.TRAINING:
            raise ConfigError(f"job {self.job} is {self.state}; only a running job can be scaled")
        if not 1 <= workers <= 4096:
            raise ConfigError(f"workers: between 1 and 4096, not {workers}")
        ranks = self.spec.ranks
        if workers % ranks:
            near = multiple_of_ranks(workers, ranks)
            raise ConfigError(
                f"workers: a replica of job {self.job} has {ranks}; give a multiple of it, such as {near}"
            )
        if self.spec.min_workers is not None and workers < self.spec.min_workers:
            raise ConfigError(f"job {self.job} was submitted with at least {self.spec.min_workers} workers")
        for process in self.roster.workers():
            process.replace = False  # who leaves already is counted out below, and not replaced twice
        staying = sorted({p.index // ranks for p in self.roster.staying()})
        self.fewest = min(self.fewest, workers)
        self.wanted = workers
        for replica in staying[workers // ranks :]:
            self._let_go(self.processes["worker", replica * ranks], replace=False)
        for slot in self.roster.free_slots(max(0, workers - len(staying) * ranks)):
            self._want_worker(slot, now_s)
        return self._advance(now_s, [])

    def drain(self, keys: list[Key], now_s: float) -> list[Effect]:
        """These workers' places are needed for something else: they leave, and others are wanted instead."""
        if self.phase is Phase.TRAINING:
            for key in keys:
                process = self.processes.get(key)
                if process is not None and process.role == "worker" and process.running and not process.fallen:
                    self._let_go(process, replace=not process.leaving or process.replace)
        return self._advance(now_s, [])

    # ------------------------------------------------------------ processes

    def _populate(self, now_s: float) -> None:
        spec = self.spec
        self.roster.populate(self.training.facts.workers, spec.shards, spec.replication, self.restarts, now_s)
        for process in self.roster.workers():
            self.training.expect(process.index, process.epoch)
        for process in self.roster.servers():
            self.training.expect_server(process.index, process.epoch)
        self._enter(Phase.STARTING, now_s)

    def _want_worker(self, slot: int, now_s: float) -> None:
        self.training.expect(slot, self.roster.want_worker(slot, now_s).epoch)

    def _let_go(self, process: Process, replace: bool) -> None:
        """A worker is to leave, with its replica."""
        for mate in self.roster.mates(process):
            if mate.fallen and not replace:
                mate.fallen = "out"
            if mate.state != "ended" and not self.roster.let_go(mate, replace):
                self.training.worker_lost(mate.index)

    def _have_one_soon(self) -> None:
        """So that there is something to come back to from the beginning."""
        if self._spare and self._newest == self._floor:
            self.checkpoints.wish("the first")

    @property
    def _spare(self) -> bool:
        """Whether there are restarts left."""
        return self.restarts < self.spec.restarts and not self.interrupted

    def _can_spend(self, failure: Failure, now_s: float) -> bool:
        """Whether another process may be started for this; all that is lost with one host costs one restart."""
        return self._spare or (self._lost_host == (failure.host, now_s) and not self.interrupted)

    def _spend(self, process: Process, failure: Failure, meaning: str, now_s: float) -> None:
        self.restarts += self._lost_host != (failure.host, now_s)
        self._lost_host = (failure.host, now_s) if failure.reason == "NODE_LOST" else ("", 0.0)
        self.last_failure = failure
        who = failure.who if process.ranks > 1 else process.name
        self.warnings.append(f"{who} {failure.message}; {meaning}")

    def _begin_again(self, failure: Failure, now_s: float, paid: bool = False) -> None:
        """The job ends, and begins again from its last checkpoint if it may. ``paid``: this failure has cost a restart
        already."""
        self.restarts -= paid and self.restarts > 0
        if self.failure is None and self.phase is Phase.SAVING:
            self.failure = failure
            self._enter(Phase.LEAVING, now_s)
        self._fail(failure, now_s)

    # ------------------------------------------------------------ from phase to phase

    def _enter(self, phase: Phase, now_s: float) -> None:
        self.phase = phase
        self._since_s = now_s
        self._asked_s = float("-inf")
        self._awaited, self._committed, self._saves = 0, False, 1

    def _advance(self, now_s: float, effects: list[Effect]) -> list[Effect]:
        """Go on from phase to phase as far as what is known allows."""
        self._now_s = now_s
        if self.spec.replication > 1 and self.phase in REPLICATED:
            self.standby.begins(self.training, now_s, effects)
            self.standby.look(self.training, self.spec.settings.start_timeout_s, now_s, effects)
        while True:
            before = self.phase
            if self._hurry and before not in (Phase.ENDING, Phase.OVER):
                self._enter(Phase.ENDING, now_s)
            match self.phase:
                case Phase.STARTING:
                    running.start(self, now_s)
                case Phase.TRAINING:
                    running.train(self, now_s, effects)
                case Phase.KEEPING:
                    ending.keep_position(self, now_s, effects)
                case Phase.LEAVING:
                    ending.leave(self, now_s, effects)
                case Phase.SAVING:
                    ending.save(self, now_s, effects)
                case Phase.CLOSING:
                    ending.close(self, now_s, effects)
                case Phase.ENDING:
                    beginnings.end(self, now_s, effects)
                case Phase.WAITING:
                    beginnings.wait(self, now_s, effects)
            if self.phase is before:
                return effects

    def _fail(self, failure: Failure, now_s: float) -> None:
        if self.failure is None and self.phase in (Phase.STARTING, Phase.TRAINING):
            self.failure = failure
            self._to_tell = "failed"
            self._enter(Phase.LEAVING, now_s)

    def fail(self, failure: Failure, now_s: float) -> list[Effect]:
        """Something outside of the processes went wrong; the job ends."""
        self._fail(failure, now_s)
        return self._advance(now_s, [])

    # ------------------------------------------------------------ durability

    def document(self) -> dict[str, Any]:
        """All that must survive the process, but for the model, as plain values."""
        return document_of(self)

    @classmethod
    def from_document(cls, job: str, document: dict[str, Any], model: ModelSpec | None, now_s: float) -> Lifecycle:
        """The inverse of :meth:`document`; every wait begins anew, snapshots and exports under way are repeated."""
        facts = JobFacts.from_document(document["origin"])
        life = cls(job, JobSpec(**document["spec"]), facts, document["base"], document["snapshots"])
        restore(life, document, model, now_s)
        return life
