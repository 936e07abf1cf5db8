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

from collections.abc import Collection, Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Any, Literal

from downpour_common import exitcodes
from downpour_common import messages as m
from downpour_common.config import JobSpec
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message
from downpour_common.replicas import multiple_of_ranks, titled
from downpour_common.transport import Peer
from downpour_coordinator.changes import Changes, differences
from downpour_coordinator.checkpointing import RETRY_S, Checkpointing
from downpour_coordinator.effects import (
    Effect,
    Export,
    FindCheckpoint,
    FindShardCheckpoint,
    ForgetSnapshot,
    LogRow,
    SpecChanged,
)
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.processes import Failure, Key, Process, explain
from downpour_coordinator.recorder import Recorder
from downpour_coordinator.recovery import LONG_S, STUCK_S, Signs, troubles, whole_backoff_s
from downpour_coordinator.roster import DRAIN_S, Roster
from downpour_coordinator.snapshots import CommitSnapshot
from downpour_coordinator.spares import silent_spares
from downpour_coordinator.standby import Standby
from downpour_coordinator.training import Training

KEEP_S = 5.0
"""Time that an interrupted job is given for its last checkpoint: with ``grace_s`` it has ended in 10 s."""
SAVES = 3
"""Attempts to write the last checkpoint, which holds the result."""
CLOSE_S = 5.0
"""Time that shards are given to end by themselves."""
TELL_S = 0.1
"""Time between telling workers that the job ends and ending them."""
NO_PLACE_S = 10.0
"""Time that a worker which is to take over waits for a place, before a job that can do with fewer does so."""
CANCEL_GRACE_S = 3.0
"""Most time between SIGTERM and SIGKILL in a job that is cancelled."""


class Phase(StrEnum):
    """Where a job is; see the module."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    TRAINING = "TRAINING"
    KEEPING = "KEEPING"
    LEAVING = "LEAVING"
    SAVING = "SAVING"
    EXPORTING = "EXPORTING"
    CLOSING = "CLOSING"
    ENDING = "ENDING"
    WAITING = "WAITING"
    OVER = "OVER"


_REPLICATED = (Phase.STARTING, Phase.TRAINING, Phase.KEEPING, Phase.LEAVING, Phase.SAVING)
"""Phases in which a shard without a backup gets one."""
_MEASURED = (Phase.TRAINING, Phase.KEEPING, Phase.LEAVING, Phase.SAVING, Phase.CLOSING)


class Lifecycle:
    """One job. ``base`` is put before ``checkpoints/NNNNNN``: its run directory with a slash, or "" in a cluster."""

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
        self._told_s = -TELL_S
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
        phase = self.phase
        if phase is Phase.OVER:
            return (
                "FAILED" if self.failure else "CANCELLED" if self.interrupted and not self._ended_well else "SUCCEEDED"
            )
        if phase is Phase.QUEUED:
            return "PENDING" if self.begun_s is None else "RESTARTING"
        if phase is Phase.STARTING:
            return "RESTARTING" if self.restarts or self.changes.before is not None else "STARTING"
        if self.changes.leaving and not self.interrupted:
            return "RESTARTING"
        if phase is Phase.WAITING or (phase is Phase.ENDING and (self._will_restart or self._takes_back)):
            return "RESTARTING"
        if phase is Phase.TRAINING:
            return "RUNNING" if self.training.live() else "RESTARTING"
        return "STOPPING"

    @property
    def reason(self) -> str:
        """Why it is in this state, one word; see docs/cluster.md."""
        if self.failure is not None:
            return self.failure.reason
        if self.interrupted and not self._ended_well:
            return self.interrupted
        if self.state == "RESTARTING" and (self.changes.leaving or self.changes.before is not None):
            return "CHANGED"
        if self.state == "RESTARTING" and self.last_failure is not None:
            return self.last_failure.reason
        return {"PENDING": "QUEUED", "STARTING": "STARTING"}.get(self.state, "")

    @property
    def processes(self) -> dict[Key, Process]:
        """By (role, index)."""
        return self.roster.all

    @property
    def degraded(self) -> str:
        """What goes wrong without ending the job, or ""."""
        found = [self.checkpoints.degraded]
        if self.phase in (Phase.TRAINING, Phase.SAVING, Phase.KEEPING) and self.training.begun:
            found += troubles(self.training, self.processes, self._signs, self._now_s)
        return "; ".join(filter(None, found))

    @property
    def remarks(self) -> list[str]:
        """The warnings, and what is counted: pushes that were lost, contributions that were left out."""
        found = list(self.warnings)
        for index, lost in sorted(self.training.lost().items()):
            found.append(f"{_count(lost.pushes, 'push', 'es')} {_were(lost.pushes)} lost with server/{index}")
        for slot, count in sorted(self.training.non_finite().items()):
            text = f"{titled('worker', slot, self.spec.ranks)} sent NaN or Inf in {_count(count, 'contribution', 's')}"
            found.append(f"{text}, which {_were(count)} left out")
        return found

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.phase is Phase.OVER

    def waiting_for(self) -> list[str]:
        """What the job waits for at its start: processes without a place, not joined, or a model not taken."""
        if self.phase is Phase.TRAINING and self.training.live():
            return []
        if self.phase not in (Phase.STARTING, Phase.TRAINING):
            return []
        return self.training.waiting_for() or ["the servers to take the model"]

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
            self._judge_shard(process, now_s, effects)
        elif self.phase in (Phase.STARTING, Phase.TRAINING):
            self._judge(process, now_s, effects)
        return self._advance(now_s, effects)

    def tick(self, now_s: float) -> list[Effect]:
        """Time passes; call it a few times per second."""
        self._signs.listening(now_s)
        effects: list[Effect] = []
        if self.phase in _MEASURED and self.first_step_s is not None:
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
            self._snapshot_over(error, now_s, effects)
        return self._advance(now_s, effects)

    def exported(self, path: str, error: str, now_s: float) -> list[Effect]:
        """``model.safetensors`` is written, or why not."""
        if self.phase is Phase.EXPORTING:
            self.model = path
            if error:
                self._result_lost(error)
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

    def _judge(self, process: Process, now_s: float, effects: list[Effect]) -> None:
        """What the end of a worker's process means while the job starts or trains. It takes its replica along."""
        worker = self.training.workers.get(process.index)
        mates = self.roster.mates(process)
        if worker is not None and worker.gone and process.code == 0 and not worker.drained:
            if process.fallen:
                self._replica_over(mates, now_s)
            return
        mine = (process.index, process.epoch)
        reported = next((f for f in self.training.failures if worker and (f.slot, f.worker_epoch) == mine), None)
        failure = explain(process, worker is not None and bool(worker.pid), reported, self.spec.script)
        failure = self._cause(failure, process, mates)
        left = worker is not None and worker.gone and worker.drained
        synchronous = self.training.facts.mode.synchronous
        in_round = synchronous and worker is not None and not left and (worker.answered or worker.takes_over)
        training = self.phase is Phase.TRAINING and self.training.begun
        alone = len(mates) == 1
        if process.fallen == "over":
            self._replica_over(mates, now_s)
            return
        keeps = not self.spec.compression.remembers  # else what it owed, or had, is lost with it
        in_place = in_round and training and keeps and not any(self.training.workers[p.index].gone for p in mates)
        if in_place and not process.fallen and self._can_spend(failure, now_s):
            self._take_over(process, mates, failure, now_s)
            return
        if (self.training.begun and not synchronous) or (worker is not None and not left and not in_round):
            for mate in [process] if left else mates:
                effects.extend(self.training.worker_lost(mate.index))  # in sync: it never counted
        if process.fallen or (
            process.leaving and (left or not process.replace or process.code in (None, 143, -15, -9))
        ):
            if in_round:
                self._begin_again(failure, now_s, paid=process.fallen == "again")
            elif self.roster.stop(mates, DRAIN_S if left else 0.0):
                self._replica_over(mates, now_s)
            return
        replaceable = training and not in_round
        if left:
            failure = replace(failure, message="was asked to leave (SIGTERM) by somebody else", reason="PREEMPTED")
            if self.fewest >= self.wanted:
                failure = replace(failure, details=f"fewer than {self.fewest} workers are left (see --min-workers)")
        others = [p for p in self.roster.staying() if p not in mates]
        if replaceable and self._can_spend(failure, now_s):
            self._spend(process, failure, "it is being replaced" if alone else "its replica is started again", now_s)
            self._fell(mates, "again")
        elif replaceable and len(others) >= self.fewest and self.fewest < self.wanted:
            without = "it" if alone else "its replica"
            self.warnings.append(f"{failure.who} {failure.message}; the others go on without {without}")
            self._fell(mates, "out")
        else:
            self._fail(failure, now_s)
            return
        if self.roster.stop(mates, DRAIN_S if left else 0.0):
            self._replica_over(mates, now_s)

    def _cause(self, failure: Failure, process: Process, mates: list[Process]) -> Failure:
        """In a replica the end of one rank makes the others raise, and it need not be the first that has ended."""
        epochs = {p.index: p.epoch for p in mates}
        reported = [f for f in self.training.failures if epochs.get(f.slot) == f.worker_epoch]
        lost = {f.slot for f in reported if f.consequence}
        first = next((f for f in reported if not f.consequence), None)
        if failure.reason != "SCRIPT_FAILED" or (first is None and process.index not in lost):
            return failure
        if first is None:
            others = [p for p in mates if p.index not in lost]
            dead = next((p for p in others if p.state == "ended" and p.code != 0), None)
            if dead is not None:
                return explain(dead, True, None, self.spec.script)
            silence = {p.index: self._signs.quiet_s(p, self._now_s) for p in others if p.running}
            stuck = max(silence, key=silence.__getitem__, default=-1)
            if silence.get(stuck, 0.0) > STUCK_S:
                message = f"has not been heard of for {silence[stuck]:.0f} s, and {process.title} waited for it in vain"
                return replace(failure, index=stuck, message=message)
            first = next((f for f in reported if f.consequence == "late"), None)
        if first is None:
            return failure
        return replace(failure, index=first.slot, message=first.error, details=first.traceback.rstrip())

    @staticmethod
    def _fell(mates: list[Process], fate: Literal["again", "out", "over"]) -> None:
        for mate in mates:
            mate.fallen = fate

    def _replica_over(self, mates: list[Process], now_s: float) -> None:
        """Once all workers of a replica have ended: others in their places, if they are wanted."""
        if any(p.state != "ended" for p in mates):
            return
        if any(p.fallen == "over" for p in mates):
            for before, after in zip(mates, self.roster.succeed_together(mates, now_s), strict=True):
                after.leaving = before.leaving and not before.replace
                self.training.take_over(after.index, after.epoch)
        elif any(p.fallen == "again" for p in mates):
            for process in self.roster.succeed_together(mates, now_s):
                self.training.expect(process.index, process.epoch)
        elif any(p.leaving and p.replace and not p.fallen for p in mates):
            for process in mates:
                self._want_worker(process.index, now_s)

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

    def _take_over(self, process: Process, mates: list[Process], failure: Failure, now_s: float) -> None:
        """sync: another process goes on in the round that this worker has died in, or others in the places of its
        replica once all of that have ended; they leave then if they were to."""
        meaning = "another process takes over" if len(mates) == 1 else "others take over its replica"
        self._spend(process, failure, meaning, now_s)
        self._fell(mates, "over")
        if self.roster.stop(mates, 0.0):
            self._replica_over(mates, now_s)

    def _judge_shard(self, process: Process, now_s: float, effects: list[Effect]) -> None:
        """What the end of a shard's process means."""
        failure = explain(process, False, None, self.spec.script)
        if self.spec.replication > 1 and self.phase in _REPLICATED:
            if was := self.standby.ended(self.training, process, failure.message, now_s, effects):
                if was == "leader":
                    self._give_up_snapshot(process, now_s, effects)
                return
            failure = replace(failure, index=process.index % self.spec.shards)
        saving = self.phase is Phase.SAVING and not self._committed and not self._keep
        if self.phase in (Phase.STARTING, Phase.TRAINING) or (saving and self._can_spend(failure, now_s)):
            alone = not self.training.facts.mode.synchronous and self.training.begun and self._newest > self._floor
            if alone and self._can_spend(failure, now_s):
                self._recover(process, failure, now_s, effects)
            else:
                self._begin_again(failure, now_s)

    def _recover(self, process: Process, failure: Failure, now_s: float, effects: list[Effect]) -> None:
        """A shard alone comes back from the last checkpoint; the others go on."""
        self._spend(process, failure, "it comes back from the last checkpoint", now_s)
        self._give_up_snapshot(process, now_s, effects)
        self.training.shard_lost(process.index % self.spec.shards, self.roster.succeed(process, now_s).epoch)
        self._sought_s = float("-inf")

    def _give_up_snapshot(self, process: Process, now_s: float, effects: list[Effect]) -> None:
        """It has ended with a part of the snapshot under way."""
        if self._drop_snapshot(effects):
            self.checkpoints.wait_from(now_s)
            self.checkpoints.wish(f"after {process.name} {process.epoch}")
            self._awaited = 0
        if self.phase is Phase.SAVING:
            self._since_s = now_s

    def _drop_snapshot(self, effects: list[Effect]) -> bool:
        """The snapshot under way, if there is one, is not to count."""
        number = self.training.snapshot
        if number:
            self.training.abandon_snapshot()
            effects.append(ForgetSnapshot(number))
        return bool(number)

    def _begin_again(self, failure: Failure, now_s: float, paid: bool = False) -> None:
        """The job ends, and begins again from its last checkpoint if it may. ``paid``: this failure has cost a restart
        already."""
        self.restarts -= paid and self.restarts > 0
        if self.failure is None and self.phase is Phase.SAVING:
            self.failure = failure
            self._enter(Phase.LEAVING, now_s)
        self._fail(failure, now_s)

    def _seek(self, now_s: float, effects: list[Effect]) -> None:
        """See to it that shards come back."""
        for shard in self.training.recovering():
            process = self.processes["server", shard.process]
            limit_s = self.spec.settings.start_timeout_s
            late = process.waited_s(now_s) > limit_s
            if shard.error or (late and process.state == "pending"):
                message = shard.error or f"has had no place for {limit_s:g} s"
                reason = "NOT_STARTED" if shard.error else "START_TIMEOUT"
                failure = Failure("server", shard.index, exitcodes.FAILED, message, reason=reason)
                self._begin_again(failure, now_s, paid=True)
                return
            if late and process.running and process.stop is None:
                process.stop = self.spec.settings.grace_s
                self.warnings.append(f"{process.name} has not come back within {limit_s:g} s")
        waiting = tuple(s.index for s in self.training.recovering() if not s.checkpoint)
        if waiting and not self._committing and now_s - self._sought_s > RETRY_S:
            self._sought_s = now_s
            effects.append(FindShardCheckpoint(self._floor, waiting))

    def _consequences(self, now_s: float) -> None:
        """What ``on_nan`` says of workers that have sent NaN or Inf."""
        way = self.spec.settings.on_nan
        counts = self.training.non_finite() if way in ("quarantine", "rollback") else {}
        for slot, count in counts.items():
            process = self.processes.get(("worker", slot))
            if count <= self._non_finite.get(slot, 0) or process is None or process.state == "ended" or process.fallen:
                continue
            self._non_finite[slot] = count
            words = "sent NaN or Inf"
            failure = Failure(
                *("worker", slot, exitcodes.FAILED, words), reason="NON_FINITE", host=process.node, ranks=process.ranks
            )
            if way == "rollback":
                self._fail(failure, now_s)
            elif not process.leaving:
                least = self.spec.min_workers or 1
                if len(self.roster.staying()) - process.ranks < least:
                    details = f"without it fewer than {_count(least, 'worker', 's')} would be left"
                    self._fail(replace(failure, details=details), now_s)
                else:
                    self.wanted -= process.ranks
                    self.fewest = min(self.fewest, self.wanted)
                    who = "it" if process.ranks == 1 else "its replica"
                    self.warnings.append(f"{process.title} {words}; {who} leaves the job (on_nan=quarantine)")
                    self._let_go(process, replace=False)

    # ------------------------------------------------------------ from phase to phase

    def _enter(self, phase: Phase, now_s: float) -> None:
        self.phase = phase
        self._since_s = now_s
        self._asked_s = float("-inf")
        self._awaited, self._committed, self._saves = 0, False, 1

    def _advance(self, now_s: float, effects: list[Effect]) -> list[Effect]:
        """Go on from phase to phase as far as what is known allows."""
        self._now_s = now_s
        if self.spec.replication > 1 and self.phase in _REPLICATED:
            self.standby.begins(self.training, now_s, effects)
            self.standby.look(self.training, self.spec.settings.start_timeout_s, now_s, effects)
        while True:
            before = self.phase
            if self._hurry and before not in (Phase.ENDING, Phase.OVER):
                self._enter(Phase.ENDING, now_s)
            match self.phase:
                case Phase.STARTING:
                    self._starting(now_s)
                case Phase.TRAINING:
                    self._train(now_s, effects)
                case Phase.KEEPING:
                    self._keep_position(now_s, effects)
                case Phase.LEAVING:
                    self._leave(now_s, effects)
                case Phase.SAVING:
                    self._save(now_s, effects)
                case Phase.CLOSING:
                    self._close(now_s, effects)
                case Phase.ENDING:
                    self._end(now_s, effects)
                case Phase.WAITING:
                    self._wait(now_s, effects)
            if self.phase is before:
                return effects

    def _starting(self, now_s: float) -> None:
        if self.training.begun:
            self.first_step_s = self.first_step_s or now_s
            self.checkpoints.wait_from(now_s)
            self._trains_s = now_s
            self._have_one_soon()
            self._enter(Phase.TRAINING, now_s)
            for slot in range(self.training.facts.workers, self.wanted):
                self._want_worker(slot, now_s)
        elif not self.pending() and now_s - self._since_s > self.spec.settings.start_timeout_s:
            names = ", ".join(self.training.waiting_for()) or "the servers to take the model"
            message = f"after {now_s - self._since_s:.0f} s still waiting for {names}"
            self._fail(Failure("run", -1, exitcodes.FAILED, message, reason="START_TIMEOUT"), now_s)

    def _train(self, now_s: float, effects: list[Effect]) -> None:
        settings = self.spec.settings
        if self.training.clock() > self.training.facts.clock:
            self.changes.settled()
        if self.changes.wish and (wish := self.checkpoints.wish(self.changes.wish)).committed:
            self.changes.leave(wish.number)
            self._to_tell = "changed"
            self._enter(Phase.LEAVING, now_s)
            return
        self.checkpoints.failures_seen(self.restarts, now_s - (self.first_step_s or now_s))
        self._consequences(now_s)
        self._seek(now_s, effects)
        if self.phase is not Phase.TRAINING:
            return
        joined = {w.slot for w in self.training.workers.values() if w.answered}
        taking_over = {w.slot for w in self.training.workers.values() if w.takes_over and not w.answered}
        if not any(p.state != "ended" and p.index in joined | taking_over for p in self.roster.workers()):
            if any(all(mate.code == 0 for mate in self.roster.mates(p)) for p in self.roster.workers()):
                self.trained_s = now_s
                self.changes.settled()
                self.training.turn_away()
                self._enter(Phase.SAVING, now_s)
                return
            if not any(p.state != "ended" for p in self.roster.workers()):
                self._fail(Failure("run", -1, exitcodes.FAILED, "no worker is left", reason="BELOW_MIN"), now_s)
                return
        for process in silent_spares(self.training, self.roster, self._signs, now_s):
            words = "has not been heard of, and all others have ended: the job ends without it"
            self.warnings.append(f"{process.title} {words} (mode {self.spec.mode})")
            self._let_go(process, replace=False)
            self.roster.stop(self.roster.mates(process), settings.grace_s)
        for process in self.roster.workers():
            late = now_s - process.since_s > settings.start_timeout_s
            if process.leaving and process.stop is None and process.index in joined and process.running:
                self._let_go(process, replace=False)  # it has taken over from one that was to leave
            if process.running and process.index not in joined and late and process.stop is None:
                mates = self.roster.mates(process)
                absent = [p.name for p in mates if self.training.workers[p.index].pid == 0] or [process.title]
                self.roster.stop(mates, settings.grace_s)
                self.warnings.append(f"{', '.join(absent)} has not joined within {settings.start_timeout_s:g} s")
        waiting_s = max((now_s - p.since_s for p in self.roster.workers() if p.state == "pending"), default=0.0)
        enough = len(joined & {p.index for p in self.roster.staying()}) >= self.fewest
        stranded_s = max((p.waited_s(now_s) for p in self.roster.pending() if p.index in taking_over), default=0.0)
        if stranded_s > (NO_PLACE_S if self.fewest < self.wanted else settings.start_timeout_s) and self.last_failure:
            self._begin_again(self.last_failure, now_s, paid=True)
        elif waiting_s > settings.start_timeout_s and not enough and not taking_over:
            message = f"fewer than {self.fewest} workers, and no place for more within {settings.start_timeout_s:g} s"
            self._fail(Failure("run", -1, exitcodes.FAILED, message, reason="BELOW_MIN"), now_s)
        elif self.checkpoints.due(now_s) and self.training.paced and not self.training.snapshot:
            self.checkpoints.begin(self.training, now_s, effects)
        else:
            self.checkpoints.repeat(self.training, now_s, effects)

    def _keep_position(self, now_s: float, effects: list[Effect]) -> None:
        """Interrupted: a checkpoint while the workers still run, so that in sync all shards are at one clock."""
        running = any(p.running for p in self.roster.workers())
        if self._kept:
            self.warnings.append(f"interrupted; go on with --resume {self.spec.out or self.job}")
            self._enter(Phase.LEAVING, now_s)
        elif not running and all(p.code == 0 for p in self.roster.workers()):
            self.warnings.append("interrupted, but every script had ended well by then")
            self.trained_s = self.trained_s or now_s
            self._keep = False
            self._enter(Phase.SAVING, now_s)
        elif not running or now_s - self._since_s > KEEP_S or self._leaderless():
            self._enter(Phase.LEAVING, now_s)
        elif self._awaited:
            self.checkpoints.repeat(self.training, now_s, effects)
        elif self.checkpoints.may_retry(now_s):
            self._awaited = self.checkpoints.begin(self.training, now_s, effects)

    def _leave(self, now_s: float, effects: list[Effect]) -> None:
        """The workers end; then comes the last checkpoint of an interrupted job, if there is none yet."""
        if self.failure is not None:
            self._drop_snapshot(effects)  # workers leave in the middle of rounds, which must not be gone back to
        if self._to_tell:  # so that a script which gets SIGTERM does not try to leave a job that ends in good order
            effects.extend(self.training.ask_to_stop(self._to_tell))
            self._to_tell, self._told_s = "", now_s
        if now_s - self._told_s < TELL_S:
            return
        if not self.roster.stop(self.roster.workers(), self._grace_s()):
            return
        keep = self._keep and not self._kept and self.failure is None and self.training.begun
        self._enter(Phase.SAVING if keep else Phase.CLOSING, now_s)

    def _save(self, now_s: float, effects: list[Effect]) -> None:
        """The last checkpoint, of what the workers have left at the shards."""
        limit_s = KEEP_S if self._keep else self.spec.settings.timeout_s
        error = ""
        coming = {s.index for s in self.training.away()}
        if coming and not self._committed:
            self._seek(now_s, effects)
            if self.phase is not Phase.SAVING:
                return
        if not self._committed and self._leaderless(coming):
            error = "a shard is gone"
        elif not self._committed and now_s - self._since_s > limit_s:
            error = f"the shards did not answer within {limit_s:g} s"
        elif (coming and not self._committed) or not (self._awaited or self.checkpoints.may_retry(now_s)):
            pass  # soon
        elif not self._awaited:
            self._awaited = self.checkpoints.begin(self.training, now_s, effects, final=True)
            if not self._awaited:
                self._ended_well = not self._keep
                self._enter(Phase.LEAVING if not self._keep else Phase.CLOSING, now_s)
                return
        else:
            self.checkpoints.repeat(self.training, now_s, effects)
        if error:
            self.training.abandon_snapshot()
            self._snapshot_over(error, now_s, effects)

    def _leaderless(self, coming: Collection[int] = ()) -> bool:
        """Whether a shard is gone for good."""
        shards = self.training.shards.values()
        return any(not self.processes["server", s.process].running and s.index not in coming for s in shards)

    def _snapshot_over(self, error: str, now_s: float, effects: list[Effect]) -> None:
        """The snapshot that the phase waits for has been committed, or will not be."""
        number, self._awaited = self._awaited, 0
        if self.phase is Phase.KEEPING:
            self._kept = not error
        elif self.phase is Phase.SAVING and self._keep:
            told = f"no checkpoint was made at the interruption: {error}"
            self.warnings.append(told if error else f"interrupted; go on with --resume {self.spec.out or self.job}")
            self._kept = not error
            self._enter(Phase.CLOSING, now_s)
        elif self.phase is Phase.SAVING:
            if error and number and self._saves < SAVES:
                self._saves, self._committed = self._saves + 1, False  # and again, after a moment
            elif error:
                self._result_lost(error)
                self._enter(Phase.LEAVING, now_s)
            else:
                self._enter(Phase.EXPORTING, now_s)
                effects.append(Export(number))

    def _close(self, now_s: float, effects: list[Effect]) -> None:
        """The shards end by themselves, with a last report."""
        ready = self.training.servers_ready()
        waited_for = [p for p in self.roster.servers() if p.running and p.index in ready]
        if now_s - self._asked_s > 1.0:
            self._asked_s = now_s
            effects.extend(self.training.stop_shards())
        hasty = self.failure is not None or self.interrupted == "CANCELLED"
        if not waited_for or hasty or now_s - self._since_s > CLOSE_S:
            self._enter(Phase.ENDING, now_s)

    def _end(self, now_s: float, effects: list[Effect]) -> None:
        if not self.roster.stop(list(self.processes.values()), self._grace_s()):
            return
        if self.changes.leaving and not self.interrupted:
            self._go_on_with(self.changes.take(self.spec), now_s, effects)
        elif self._takes_back:
            assert self.failure is not None
            told = self._told(self.failure)
            before = self.changes.take_back(told)
            self.warnings.append(f"{told}: the change was taken back, and the job goes on as it was")
            self.last_failure, self.failure = self.failure, None
            self._go_on_with(before, now_s, effects)
        elif self._will_restart:
            assert self.failure is not None
            self.restarts += 1
            self.warnings.append(f"{self._told(self.failure)}; the job was started again from its last checkpoint")
            self.last_failure, self.failure = self.failure, None
            soon = self.training.begun and now_s - (self._trains_s or now_s) < LONG_S
            self._begun_again = self._begun_again + 1 if soon or not self.training.begun else 1
            self.training = self.training.anew(self.training.facts)
            self._committing = 0
            self._enter(Phase.WAITING, now_s)
        else:
            if self.changes.leaving:
                self.warnings.append(f"interrupted; go on with --resume {self.spec.out or self.job}")
            self._enter(Phase.OVER, now_s)

    @property
    def _takes_back(self) -> bool:
        """Whether the job ends because of the change that it is on trial with."""
        if self.changes.before is None or self.failure is None or self.interrupted:
            return False
        return self.failure.reason != "NODE_LOST" or not self._will_restart

    def _go_on_with(self, spec: JobSpec, now_s: float, effects: list[Effect]) -> None:
        """From the newest checkpoint on, with this description."""
        effects.append(LogRow({"changed": differences(self.spec, spec), "checkpoint": self.changes.number}))
        effects.append(SpecChanged())
        self.recorder.change(spec)
        self.spec = spec
        self.origin = replace(self.origin, mode=spec.parsed_mode)
        self.checkpoints.settings(spec.settings)
        self.training = self.training.anew(replace(self.training.facts, mode=spec.parsed_mode))
        self._committing = self._begun_again = 0
        self._enter(Phase.WAITING, now_s)

    def _wait(self, now_s: float, effects: list[Effect]) -> None:
        if now_s - self._since_s >= whole_backoff_s(self._begun_again) and now_s - self._asked_s > RETRY_S:
            self._asked_s = now_s
            effects.append(FindCheckpoint())

    @property
    def _will_restart(self) -> bool:
        lost = self.failure is not None and self.failure.reason not in ("RESULT_NOT_WRITTEN", "NO_PREPARE")
        return lost and not self.interrupted and self.restarts < self.spec.restarts

    def _grace_s(self) -> float:
        """Time between SIGTERM and SIGKILL for what is ended now."""
        if self._hurry:
            return 0.0
        grace_s = self.spec.settings.grace_s
        return min(grace_s, CANCEL_GRACE_S) if self.interrupted == "CANCELLED" else grace_s

    def _fail(self, failure: Failure, now_s: float) -> None:
        if self.failure is None and self.phase in (Phase.STARTING, Phase.TRAINING):
            self.failure = failure
            self._to_tell = "failed"
            self._enter(Phase.LEAVING, now_s)

    def fail(self, failure: Failure, now_s: float) -> list[Effect]:
        """Something outside of the processes went wrong; the job ends."""
        self._fail(failure, now_s)
        return self._advance(now_s, [])

    def _result_lost(self, error: str) -> None:
        message = f"training ended well, but its result could not be written: {error}"
        self.failure = Failure("run", -1, exitcodes.IO_ERROR, message, reason="RESULT_NOT_WRITTEN")

    @staticmethod
    def _told(failure: Failure) -> str:
        return f"{failure.who} {failure.message}".strip()

    # ------------------------------------------------------------ durability

    def document(self) -> dict[str, Any]:
        """All that must survive the process, but for the model, as plain values."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "base": self.checkpoints.base,
            "phase": self.phase.value,
            "processes": self.roster.document(),
            "failure": self.failure.document() if self.failure else None,
            "last_failure": self.last_failure.document() if self.last_failure else None,
            "restarts": self.restarts,
            "interrupted": self.interrupted,
            "warnings": self.warnings,
            "model": self.model,
            "wanted": self.wanted,
            "fewest": self.fewest,
            "keep": self._keep,
            "kept": self._kept,
            "ended_well": self._ended_well,
            "snapshots": self.checkpoints.number,
            "times": [self.begun_s, self.first_step_s, self.trained_s],
            "checkpoints": [self._floor, self._newest],
            "begun_again": self._begun_again,
            "non_finite": list(self._non_finite.items()),
            "changes": self.changes.document(),
            "target": self.recorder.target.document(),
            "origin": self.origin.document(),
            "training": self.training.document(),
        }

    @classmethod
    def from_document(cls, job: str, document: dict[str, Any], model: ModelSpec | None, now_s: float) -> Lifecycle:
        """The inverse of :meth:`document`; every wait begins anew, snapshots and exports under way are repeated."""
        spec = JobSpec(**document["spec"])
        facts = JobFacts.from_document(document["origin"])
        self = cls(job, spec, facts, document["base"], document["snapshots"])
        self.training = Training.from_document(document["training"], model, self.checkpoints.folder)
        self._floor, self._newest = document["checkpoints"]
        self._begun_again, self._non_finite = document["begun_again"], dict(document["non_finite"])
        self.recorder.target.restore(document.get("target", {}))
        if "changes" in document:
            self.changes = Changes.from_document(document["changes"])
        self._now_s = now_s
        self.roster = Roster.from_document(document["processes"], now_s, spec.ranks)
        self.failure = Failure(**document["failure"]) if document["failure"] else None
        self.last_failure = Failure(**document["last_failure"]) if document["last_failure"] else None
        self.restarts, self.interrupted = document["restarts"], document["interrupted"]
        self.warnings, self.model = document["warnings"], document["model"]
        self.standby = Standby(self.roster, self._signs, self.warnings)
        self.wanted, self.fewest = document["wanted"], document["fewest"]
        self._keep, self._kept = document["keep"], document["kept"]
        self._ended_well = document["ended_well"]
        self._enter(Phase(document["phase"]), now_s)
        self.checkpoints.wait_from(now_s)
        self.begun_s, self.first_step_s, self.trained_s = document["times"]
        if self.phase is Phase.EXPORTING:
            self._enter(Phase.SAVING, now_s)
        if self.phase is Phase.TRAINING:
            self._have_one_soon()
        return self


def _count(number: int, noun: str, plural: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
