"""What the coordinator's tests need: a job's processes, hosts and a network made of lists, under a fake clock."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from unit_kit import JOB, model, tensor

from downpour_common import messages as m
from downpour_common.config import JobSpec, job_spec
from downpour_common.layout import ModelSpec
from downpour_common.modes import parse_mode
from downpour_coordinator.cluster import Cluster, ForJob, JobRecord, record_document, record_from
from downpour_coordinator.cluster import Effect as ClusterEffect
from downpour_coordinator.effects import Export, FindCheckpoint, FindShardCheckpoint, ForgetSnapshot, Prune
from downpour_coordinator.facts import facts_for
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Key, Process
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed
from downpour_coordinator.training import JobFacts, LogRow, Send, StorePart, Training

MODEL = model(tensor("a", 3), tensor("b", 2))
OTHER = model(tensor("a", 3), tensor("b", 5))


def through_json(document: Any) -> Any:
    """What the journal makes of it."""
    return json.loads(json.dumps(document))


def shard_entry(shard: int, **fields: Any) -> dict[str, Any]:
    """What a shard says of its file in a checkpoint."""
    entry = {"file": f"shard-{shard}.safetensors", "bytes": 5, "sha256": "5" * 64, "chunks": {}}
    return {**entry, "trainable_versions": [5], "position": [], **fields}


# ---------------------------------------------------------------- training


class Job:
    """A training and the messages of its processes. ``sent[peer]``: what each was told, in order."""

    def __init__(self, workers: int = 2, shards: int = 2, mode: str = "async", **facts: Any) -> None:
        self.workers, self.shards = workers, shards
        self.facts = JobFacts(JOB, workers, shards, parse_mode(mode), 7, 1024, **facts)
        self.state = Training(self.facts)
        self.epochs: Counter[int] = Counter()
        self.shard_epochs: Counter[int] = Counter()
        self.sent: dict[bytes, list[m.Message]] = {}
        self.outcomes: list[CommitSnapshot | SnapshotFailed] = []
        self.rows: list[dict[str, Any]] = []
        self.parts: list[m.SnapshotPart] = []
        self._request = 0

    def number(self) -> int:
        """A fresh request number."""
        self._request += 1
        return self._request

    def me(self, slot: int) -> tuple[str, int, int]:
        """What a worker's messages begin with."""
        return JOB, slot, self.epochs[slot]

    def say(self, peer: bytes, message: m.Message) -> None:
        """Hand it a message."""
        self.carry_out(self.state.handle(peer, message))

    def ask(self, peer: bytes, message: m.Request) -> m.Message | None:
        """Say it; the answer, or None while there is none."""
        self.say(peer, message)
        return self.answer(message.request)

    def answer(self, request: int) -> m.Message | None:
        """The answer to a request, wherever it went; None while there is none."""
        answers = [a for told in self.sent.values() for a in told if getattr(a, "request", None) == request]
        assert len(answers) <= 1, "a request was answered twice"
        return answers[0] if answers else None

    def told(self, peer: bytes) -> list[m.Message]:
        """What ``peer`` was told since this was asked last."""
        return self.sent.pop(peer, [])

    def carry_out(self, effects: Any) -> None:
        """Do what a carrier does with effects."""
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self.sent.setdefault(peer, []).append(message)
                case LogRow(row):
                    self.rows.append(row)
                case StorePart():
                    self.parts.append(effect.part)
                case CommitSnapshot() | SnapshotFailed():
                    self.outcomes.append(effect)

    def restarted(self) -> None:
        """The coordinator's process is another one from now on."""
        self.state = Training.from_document(through_json(self.state.document()), self.state.model)
        self.sent.clear()

    # ------------------------------------------------------------ shards

    def register_shard(self, index: int) -> None:
        """A shard process is up."""
        epoch = self.shard_epochs[index]
        address = f"address-{index}" + (f".{epoch}" if epoch else "")
        self.say(b"shard %d" % index, m.RegisterShard(JOB, index, epoch, 100 + index, address))

    def shard_ready(self, index: int, error: str = "") -> None:
        """A shard holds its chunks, or not."""
        self.say(b"shard %d" % index, m.ShardReady(JOB, index, self.shard_epochs[index], error))

    def report(self, index: int, **document: Any) -> None:
        """A shard's counters."""
        self.say(b"shard %d" % index, m.ShardReport(JOB, index, self.shard_epochs[index], document))

    def members_set(self, version: int, *indices: int) -> None:
        """Shards have the members of this version in force."""
        for index in indices or range(self.shards):
            self.say(b"shard %d" % index, m.MembersSet(JOB, index, self.shard_epochs[index], version))

    def taken(self, shard: int, snapshot: int = 1, error: str = "", **document: Any) -> None:
        """A shard's answer to a snapshot."""
        found = {} if error else shard_entry(shard, **document)
        self.say(b"shard %d" % shard, m.SnapshotTaken(JOB, shard, self.shard_epochs[shard], snapshot, error, found))

    # ------------------------------------------------------------ workers

    def register_worker(self, slot: int, spec: ModelSpec | None = MODEL, **fields: Any) -> int:
        """Register; the request's number."""
        document = spec.to_wire() if spec is not None else {}
        register = m.RegisterWorker(self.number(), *self.me(slot), 200 + slot, document)
        self.say(b"worker %d" % slot, replace(register, **fields))
        return register.request

    def start(self) -> Job:
        """Everybody joins."""
        for index in range(self.shards):
            self.register_shard(index)
        for slot in range(self.workers):
            self.register_worker(slot)
        for index in range(self.shards):
            self.shard_ready(index)
        assert self.state.training
        self.sent.clear()
        return self

    def replaced(self, slot: int) -> None:
        """The worker of ``slot``, if there is one, is lost; another is expected there."""
        if slot in self.state.workers:
            self.carry_out(self.state.worker_lost(slot))
            self.epochs[slot] += 1
        self.state.expect(slot, self.epochs[slot])

    def taken_over(self, slot: int) -> None:
        """The worker of ``slot`` has died in a round; another is expected to go on there."""
        self.epochs[slot] += 1
        self.state.take_over(slot, self.epochs[slot])

    def shard_dies(self, index: int) -> None:
        """A shard is lost; another is expected to come back in its place."""
        self.shard_epochs[index] += 1
        self.state.shard_lost(index, self.shard_epochs[index])

    def lease(self, slot: int, epoch: int = 0, total: int = 32, unit: int = 4, **fields: Any) -> m.Message:
        """Take a lease; the answer."""
        loader = fields.pop("loader", 0)
        take = m.TakeLease(self.number(), *self.me(slot), loader, epoch, total, unit, "order", ())
        answer = self.ask(b"worker %d" % slot, replace(take, **fields))
        assert answer is not None
        return answer

    def work(self, slot: int, batches: int, epoch: int = 0, total: int = 32) -> list[int]:
        """``slot`` takes and finishes this many leases; the positions it had."""
        had: list[int] = []
        done: tuple[int, ...] = ()
        for _ in range(batches):
            lease = self.lease(slot, epoch, total, done=done)
            assert isinstance(lease, m.Lease)
            had += range(lease.start, lease.stop)
            done = (lease.start, lease.stop)
        self.lease(slot, epoch, 0, 0, order="", done=done)
        return had

    def enter(self, slot: int, name: str = "barrier") -> int:
        """Enter a barrier; the request's number."""
        enter = m.EnterBarrier(self.number(), *self.me(slot), name)
        self.say(b"worker %d" % slot, enter)
        return enter.request

    def begin_pass(self, slot: int, epoch: int, clock: int = 0, loader: int = 0) -> int:
        """sync: begin a pass; the request's number."""
        begin = m.BeginPass(self.number(), *self.me(slot), loader, epoch, clock)
        self.say(b"worker %d" % slot, begin)
        return begin.request

    def progress(self, slot: int, clock: int, epoch: int = 0, samples: int = 0) -> None:
        """Say how far a worker is."""
        self.say(b"worker %d" % slot, m.Progress(*self.me(slot), clock, epoch, samples, 0, 0, 0, 0, 0.0))

    def goodbye(self, slot: int, drained: bool = False, torn: int = 0) -> m.Message | None:
        """Leave in good order; the answer."""
        return self.ask(b"worker %d" % slot, m.Goodbye(self.number(), *self.me(slot), drained, torn))


# ---------------------------------------------------------------- a job's life


def spec_of(workers: int = 2, shards: int = 1, mode: str = "async", **fields: Any) -> JobSpec:
    """A job to run; times are short, as nobody waits for them."""
    settings = {"start_timeout_s": 60.0, "timeout_s": 30.0, "checkpoint_s": 20.0, "grace_s": 5.0}
    settings.update(fields.pop("settings", {}))
    name = fields.pop("name", "digits")
    return job_spec(
        name=name, script="train.py", workers=workers, shards=shards, mode=mode, settings=settings, **fields
    )


class World:
    """A lifecycle and all that surrounds it: places, processes that obey, files. Messages arrive one after another.

    ``deaf``: keys of processes that neither answer nor obey. ``held``: work that is done when :meth:`work` is called
    (with ``slow``), else at once. ``disk_full``: why no checkpoint can be committed. ``prepares``: whether workers
    register by themselves.
    """

    def __init__(self, workers: int = 2, shards: int = 1, mode: str = "async", **fields: Any) -> None:
        self.spec = spec_of(workers, shards, mode, **fields)
        self.life = Lifecycle("job-1", self.spec, facts_for("job-1", self.spec, None, ""), "")
        self.now_s = 1000.0
        self.running: dict[Key, int] = {}
        """processes that there are → their epochs"""
        self.deaf: set[Key] = set()
        self.told: dict[Key, list[m.Message]] = {}
        self.committed: list[int] = []
        self.dropped: list[int] = []
        self.damaged: set[int] = set()
        self.exported = ""
        self.disk_full = ""
        self.slow = False
        self.prepares = True
        self.held: list[Callable[[], None]] = []
        self._to_coordinator: deque[tuple[bytes, m.Message]] = deque()
        self._to_process: deque[tuple[bytes, m.Message]] = deque()
        self._request = 0

    # ------------------------------------------------------------ what happens

    @property
    def phase(self) -> Phase:
        """Where the job is."""
        return self.life.phase

    def begin(self, workers: int | None = None) -> World:
        """Out of the queue, all placed, none started."""
        self._do(self.life.begin(self.now_s, workers))
        self.place()
        return self

    def start(self, workers: int | None = None) -> World:
        """Everybody joins."""
        self.begin(workers)
        assert self.phase is Phase.TRAINING
        return self

    def place(self) -> list[Key]:
        """Every pending process gets a place and starts; a job that queues again has its turn."""
        if self.phase is Phase.QUEUED and self.life.begun_s is not None:
            self._do(self.life.begin(self.now_s))
        placed = [p.key for p in self.life.pending()]
        for key in placed:
            self.life.placed(*key, f"node-{key[0]}", self.now_s)
            self.running[key] = self.life.processes[key].epoch
        for key in placed:
            self._join(key)
        self.settle()
        return placed

    def _join(self, key: Key) -> None:
        role, index = key
        if key in self.deaf:
            return
        if role == "server":
            epoch = self.running[key]
            self.hear(key, m.RegisterShard("job-1", index, epoch, 100 + index, f"address-{index}.{epoch}"))
        elif self.prepares:
            self.hear(key, m.RegisterWorker(self.number(), *self.me(index), 200 + index, MODEL.to_wire()))

    def end(self, key: Key, code: int | None = 0, error: str = "", tail: tuple[str, ...] = ()) -> None:
        """A process ends as it is."""
        epoch = self.running.pop(key)
        self._do(self.life.ended(key, epoch, code, self.now_s, tail, error))

    def leave(self, slot: int, drained: bool = False, code: int | None = None) -> None:
        """A worker leaves in good order and ends."""
        self.hear(("worker", slot), m.Goodbye(self.number(), *self.me(slot), drained, 0))
        self.settle()
        self.end(("worker", slot), code if code is not None else 143 if drained else 0)

    def obey(self) -> None:
        """Processes that are to end do so: workers that train leave in good order, others die of the signal."""
        for process in self.life.stopping():
            if process.key not in self.running or process.key in self.deaf:
                continue
            worker = self.life.training.workers.get(process.index) if process.role == "worker" else None
            if worker is not None and worker.answered and not worker.gone and process.stop != 0.0:
                self.leave(process.index, drained=True)
            else:
                self.end(process.key, -15)

    def tick(self, seconds: float = 0.5) -> None:
        """A little time passes."""
        self.now_s += seconds
        self._do(self.life.tick(self.now_s))

    def wait(self, seconds: float, step_s: float = 1.0, place: bool = True) -> None:
        """Time passes; all orders are obeyed, and work is done."""
        until_s = self.now_s + seconds
        while self.now_s < until_s and not self.life.over:
            self.tick(step_s)
            self.obey()
            self.work()
            if place:
                self.place()

    def wait_for(self, phase: Phase, limit_s: float = 1000.0) -> None:
        """Time passes, orders are obeyed, until the job is in ``phase``."""
        until_s = self.now_s + limit_s
        while self.phase is not phase:
            assert self.now_s < until_s, f"stuck in {self.phase}"
            self.wait(0.5, 0.5)

    def scale(self, workers: int) -> None:
        """Have another number of workers."""
        self._do(self.life.scale(workers, self.now_s))

    def drain(self, *slots: int) -> None:
        """Their places are needed."""
        self._do(self.life.drain([("worker", slot) for slot in slots], self.now_s))

    def stop(self, reason: str = "INTERRUPTED", keep: bool = True) -> None:
        """Ctrl-C, or a cancellation."""
        self._do(self.life.stop(reason, keep, self.now_s))

    def cancel(self) -> None:
        """A user does not want it any more."""
        self.stop("CANCELLED", keep=False)

    def restarted(self) -> None:
        """The coordinator's process is another one; messages and work under way are lost."""
        document = through_json(self.life.document())
        self.life = Lifecycle.from_document("job-1", document, self.life.training.model, self.now_s)
        self._to_coordinator.clear()
        self._to_process.clear()
        self.held.clear()

    def speak(self) -> None:
        """Every process says something, as it does every second or so; unanswered registrations are repeated."""
        for (role, index), epoch in self.running.items():
            if (role, index) in self.deaf:
                continue
            if role == "server":
                shard = self.life.training.shards[index]
                told = [t for t in self.told.get((role, index), []) if isinstance(t, m.SetMembers)]
                report = {"ready": shard.ready, "members": told[-1].version if told else 0, "initialised": True}
                self.hear((role, index), m.ShardReport("job-1", index, epoch, report))
                if not shard.ready:
                    self._join((role, index))
            elif (worker := self.life.training.workers[index]).epoch == epoch and not worker.gone:
                clock = worker.progress.clock if worker.progress else 0
                self.hear((role, index), m.Progress("job-1", index, epoch, clock, 0, 0, 0, 0, 0, 0, 0.0))
                if not worker.answered:
                    self._join((role, index))
        self.settle()

    # ------------------------------------------------------------ messages and work

    def number(self) -> int:
        """A fresh request number."""
        self._request += 1
        return self._request

    def me(self, slot: int) -> tuple[str, int, int]:
        """What a worker's messages begin with."""
        return "job-1", slot, self.running.get(("worker", slot), 0)

    def hear(self, key: Key, message: m.Message) -> None:
        """A process says something; see :meth:`settle`."""
        self._to_coordinator.append((f"{key[0]}/{key[1]}".encode(), message))

    def progress(self, slot: int, clock: int, samples: int = 0) -> None:
        """A worker says how far it is."""
        self.hear(("worker", slot), m.Progress(*self.me(slot), clock, 0, samples, 0, 0, 0, 0, 0.0))
        self.settle()

    def fails(self, slot: int, error: str = "ValueError: no", code: int = 1) -> None:
        """A worker's script raises."""
        self.hear(("worker", slot), m.ReportFailure(*self.me(slot), error, f"Traceback …\n{error}\n"))
        self.settle()
        self.end(("worker", slot), code)

    def settle(self) -> None:
        """All messages arrive and are answered."""
        while self._to_coordinator or self._to_process:
            if self._to_coordinator:
                peer, message = self._to_coordinator.popleft()
                if self.phase not in (Phase.QUEUED, Phase.WAITING, Phase.OVER):
                    self._do(self.life.handle(peer, message, self.now_s), settle=False)
            else:
                peer, message = self._to_process.popleft()
                role, _, index = peer.decode().partition("/")
                key = (role, int(index or -1))
                self.told.setdefault(key, []).append(message)
                if key in self.running and key not in self.deaf:
                    self._heard(key, message)

    def _heard(self, key: Key, message: m.Message) -> None:
        me = ("job-1", key[1], self.running[key])
        match message:
            case m.SetUpShard():
                self.hear(key, m.ShardReady(*me, ""))
            case m.SetMembers():
                self.hear(key, m.MembersSet(*me, message.version))
            case m.TakeSnapshot():
                self.hear(key, m.SnapshotTaken(*me, message.snapshot, "", shard_entry(key[1])))
            case m.StopShard():
                epoch = self.running.pop(key)
                self._do(self.life.ended(key, epoch, 0, self.now_s), settle=False)

    def work(self) -> None:
        """What was held is done."""
        held, self.held = self.held, []
        for work in held:
            work()
        self.settle()

    def _do(self, effects: Any, settle: bool = True) -> None:
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self._to_process.append((peer, message))
                case ForgetSnapshot(number):
                    self.dropped.append(number)
                case Prune() | LogRow() | StorePart():
                    pass
                case _:
                    self.held.append(lambda effect=effect: self._work(effect))
                    if not self.slow:
                        self.held.pop()()
        if settle:
            self.settle()

    def _work(self, effect: Any) -> None:
        life, now_s = self.life, self.now_s
        match effect:
            case CommitSnapshot(number, _, _):
                if not self.disk_full:
                    self.committed.append(number)
                self._do(life.snapshot_done(number, self.disk_full, now_s))
            case SnapshotFailed(number, _, reason):
                self._do(life.snapshot_done(number, reason, now_s))
            case Export(number):
                assert number in self.committed
                self.exported = f"model of {number}"
                self._do(life.exported(self.exported, "", now_s))
            case FindCheckpoint():
                facts = facts_for("job-1", life.spec, None, "")
                if self.committed:
                    facts = replace(facts, resume=life.checkpoints.folder(self.committed[-1]), clock=5)
                self._do(life.checkpoint_found(facts, now_s))
            case FindShardCheckpoint(after, shards):
                sound = [n for n in self.committed if n > after and n not in self.damaged]
                number = max(sound, default=0)
                skipped = tuple(f"{n} is damaged" for n in self.committed if n > number)
                self._do(life.shard_checkpoint_found(number, shards, skipped, now_s))

    def process(self, role: str, index: int) -> Process:
        """What the lifecycle knows of a process."""
        return self.life.processes[role, index]


# ---------------------------------------------------------------- a cluster


def facts(**fields: Any) -> dict[str, Any]:
    """What an agent registers with."""
    return {
        "host": "host",
        "address": "10.0.0.1",
        "cores": 4,
        "memory_bytes": 1 << 30,
        "gpus": 0,
        "labels": {},
        "slots": 2,
        "version": version("downpour-ps"),
        "boot": "boot",
        "time_s": 0.0,
        "python": "3.11",
        "platform": "linux",
        **fields,
    }


class Agent:
    """An agent that does what it is told. ``silent``: it neither hears nor says anything."""

    def __init__(self, hosts: Hosts, name: str, role: str, **fields: Any) -> None:
        self.hosts, self.name, self.role = hosts, name, role
        self.user = role
        self.facts = facts(**({"slots": 0} if role == "server" else {}), **fields)
        self.instance = "instance-1"
        self.silent = False
        self.draining = False
        self.processes: dict[tuple[str, int, int], str] = {}
        """(job, index, epoch) → state"""
        self.told: list[m.Message] = []
        self.starts: list[m.StartProcess] = []
        self.forgot: list[str] = []

    @property
    def peer(self) -> bytes:
        """Where it can be reached."""
        return f"{self.name} {self.instance}".encode()

    def register(self) -> m.Message:
        """Say who it is; the answer."""
        number = self.hosts.number()
        message = m.RegisterNode(number, self.name, self.role, self.instance, self.facts)
        before = len(self.told)
        self.hosts.do(self.hosts.cluster.register_node(self.peer, self.user, message, self.hosts.now_s))
        answers = [t for t in self.told[before:] if getattr(t, "request", None) == number]
        assert len(answers) == 1
        return answers[0]

    def restart(self) -> m.Message:
        """It was killed and is started again: its processes are dead."""
        self.instance = f"instance-{int(self.instance.partition('-')[2]) + 1}"
        self.processes.clear()
        return self.register()

    def beat(self) -> None:
        """A heartbeat."""
        if self.silent:
            return
        processes = [
            {"job": job, "role": self.role, "index": index, "epoch": epoch, "state": state, "pid": 1}
            for (job, index, epoch), state in self.processes.items()
        ]
        document = {"processes": processes, "draining": self.draining}
        beat = m.Heartbeat(self.name, self.instance, document)
        self.hosts.do(self.hosts.cluster.heartbeat(self.peer, self.user, beat, self.hosts.now_s))

    def hear(self, message: m.Message) -> None:
        """A message of the coordinator."""
        if self.silent:
            return
        self.told.append(message)
        match message:
            case m.StartProcess() if (message.job, message.index, message.epoch) not in self.processes:
                self.starts.append(message)
                self.processes[message.job, message.index, message.epoch] = "running"
            case m.StopProcess():
                self.end(message.job, message.index, message.epoch, -15, stopped="asked")
            case m.ForgetJob():
                self.forgot.append(message.job)
                for key in [k for k in self.processes if k[0] == message.job]:
                    del self.processes[key]

    def end(self, job: str, index: int, epoch: int = 0, code: int = 0, **document: Any) -> m.Message | None:
        """A process of it has ended; the answer to its report."""
        self.processes.pop((job, index, epoch), None)
        number = self.hosts.number()
        found = {"code": code, "tail": [], "error": "", "stopped": "", **document}
        message = m.ProcessEnded(number, self.name, self.instance, job, self.role, index, epoch, found)
        before = len(self.told)
        self.hosts.do(self.hosts.cluster.process_ended(self.peer, self.user, message, self.hosts.now_s))
        return next((t for t in self.told[before:] if getattr(t, "request", None) == number), None)


class Hosts:
    """A cluster and its hosts."""

    def __init__(self, node_timeout_s: float = 10.0) -> None:
        self.node_timeout_s = node_timeout_s
        self.cluster = Cluster(node_timeout_s)
        self.agents: dict[str, Agent] = {}
        self.sent: list[tuple[bytes, m.Message]] = []
        self.now_s = 1000.0
        self._request = 0
        self._jobs = 0

    def number(self) -> int:
        """A fresh request number."""
        self._request += 1
        return self._request

    def add(self, name: str, role: str = "worker", **fields: Any) -> Agent:
        """An agent joins."""
        agent = self.agents[name] = Agent(self, name, role, **fields)
        assert isinstance(agent.register(), m.Ack)
        return agent

    def submit(self, job: str = "", **fields: Any) -> JobRecord:
        """A job joins the queue, and runs where there is room."""
        self._jobs += 1
        job = job or f"digits-{self._jobs:06x}"
        spec = spec_of(**fields)
        life = Lifecycle(job, spec, facts_for(job, spec, None, ""), "")
        self.now_s += 0.001
        record = JobRecord(job, "user/alice", f"{self._jobs:032x}", "b" * 64, 77, life, None, self.now_s)
        self.cluster.submit(record)
        self.tick(0.0)
        return record

    def tick(self, seconds: float = 1.0) -> None:
        """Time passes; every agent's heart beats."""
        self.now_s += seconds
        for agent in self.agents.values():
            agent.beat()
        self.do(self.cluster.tick(self.now_s))

    def wait(self, seconds: float) -> None:
        """More time passes."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.tick()

    def do(self, effects: list[ClusterEffect]) -> None:
        """Carry out effects, as the daemon does."""
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self._send(peer, message)
                case ForJob(job, asked):
                    self._for_job(self.cluster.jobs[job].life, asked)
                    self.cluster.settle(job, self.now_s)

    def _send(self, peer: bytes, message: m.Message) -> None:
        self.sent.append((peer, message))
        for agent in list(self.agents.values()):
            if agent.peer == peer:
                agent.hear(message)

    def _for_job(self, life: Lifecycle, effects: Any) -> None:
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self._send(peer, message)
                case CommitSnapshot(number, _, _):
                    self._for_job(life, life.snapshot_done(number, "", self.now_s))
                case SnapshotFailed(number, _, reason):
                    self._for_job(life, life.snapshot_done(number, reason, self.now_s))
                case Export():
                    self._for_job(life, life.exported("model.safetensors", "", self.now_s))
                case FindCheckpoint():
                    self._for_job(life, life.checkpoint_found(facts_for(life.job, life.spec, None, ""), self.now_s))
                case FindShardCheckpoint(_, shards):
                    number = life.checkpoints.committed
                    self._for_job(life, life.shard_checkpoint_found(number, shards, (), self.now_s))

    def say(self, peer: bytes, message: m.Message) -> None:
        """A process of a job says something."""
        self.do(self.cluster.of_process(peer, message, self.now_s))

    def join(self, record: JobRecord) -> None:
        """All started processes of a job join it."""
        job, training = record.job, record.life.training
        for index in training.shards:
            peer = f"{job} server/{index}".encode()
            self.say(peer, m.RegisterShard(job, index, training.shards[index].epoch, 1, f"address-{index}"))
        for slot, worker in training.workers.items():
            if not worker.answered:
                register = m.RegisterWorker(self.number(), job, slot, worker.epoch, 2, MODEL.to_wire())
                self.say(f"{job} worker/{slot}".encode(), register)
        for index in training.shards:
            peer = f"{job} server/{index}".encode()
            self.say(peer, m.ShardReady(job, index, training.shards[index].epoch, ""))
            members = training.document()["version"]
            self.say(peer, m.MembersSet(job, index, training.shards[index].epoch, members))

    def restarted(self) -> None:
        """The coordinator is killed and started again: only what it had written down is left."""
        before, self.cluster = self.cluster, Cluster(self.node_timeout_s)
        for name, node in before.nodes.items():
            self.cluster.nodes[name] = type(node).from_document(through_json(node.document()), self.now_s)
        for job, record in before.jobs.items():
            document = through_json(record_document(record))
            self.cluster.jobs[job] = record_from(job, document, record.life.training.model, self.now_s)
