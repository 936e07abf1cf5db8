"""The cluster as a state machine: nodes, the queue of jobs, and where their processes run. No sockets, clock, files.

What a node should run is a state, not a sequence of orders: each heartbeat is compared with it and what differs is
said again. So a lost message, a restarted coordinator and a node that was away for a while need no case of their own.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m
from downpour_common.config import JobSpec
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.transport import Peer
from downpour_coordinator.effects import Effect as JobEffect
from downpour_coordinator.effects import Send
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.nodes import Node, checked_facts, reported_processes
from downpour_coordinator.phases import Phase
from downpour_coordinator.placement import Place, Room, place, place_gang
from downpour_coordinator.processes import Key, Process

NODE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ForJob:
    """Effect: carry out what this job asks for."""

    job: str
    effects: list[JobEffect]


Effect = Send | ForJob


@dataclass(frozen=True, slots=True)
class JobKeys:
    """CURVE keys of one job: what its processes present, and what its shards prove to be (public, secret)."""

    processes: tuple[str, str]
    shards: tuple[str, str]


@dataclass(slots=True)
class JobRecord:
    """A job that was submitted. Times in unix seconds."""

    job: str
    user: str
    token: str
    bundle: str
    bundle_bytes: int
    life: Lifecycle
    keys: JobKeys | None
    submitted_s: float
    started_s: float | None = None
    ended_s: float | None = None
    message: str = ""
    """why it waits"""
    nodes: list[str] = field(default_factory=list)
    """nodes that have had processes of it"""
    told: dict[tuple[str, int, int], float] = field(default_factory=dict)
    """grace that a process' node was told to stop it with, by (role, index, epoch)"""

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.life.over


class Cluster:
    """Nodes and jobs. ``node_timeout_s``: silence after which a node counts as lost. ``dirty_…``: what has changed.

    ``version``: the one that agents must have, "" for any.
    """

    def __init__(self, node_timeout_s: float, coordinator_public: str = "", version: str = "") -> None:
        self.nodes: dict[str, Node] = {}
        self.jobs: dict[str, JobRecord] = {}
        self.dirty_jobs: set[str] = set()
        self.dirty_nodes: set[str] = set()
        self._node_timeout_s = node_timeout_s
        self._coordinator_public = coordinator_public
        self._version = version

    # ------------------------------------------------------------ agents

    def register_node(self, peer: Peer, user: str, message: m.RegisterNode, now_s: float) -> list[Effect]:
        """An agent is up, or has been asked who it is."""
        known = self.nodes.get(message.node)
        code, reason = "", ""
        try:
            facts = checked_facts(message.document)
        except ProtocolError as error:
            code, reason, facts = Refusal.UNUSABLE.value, str(error), {}
        if not NODE_NAME.fullmatch(message.node) or message.role not in ("server", "worker"):
            code, reason = Refusal.UNUSABLE.value, f"{message.node!r} is no name for a {message.role!r} node"
        elif self._version and facts and facts["version"] != self._version:
            code = Refusal.UNUSABLE.value
            reason = f"downpour {facts['version']} is installed there, {self._version} here; install the same"
        elif known is not None and (known.role, known.user) != (message.role, user) and not known.lost:
            code, reason = Refusal.UNUSABLE.value, f"there is a {known.role} node called {message.node}; use --name"
        elif known is not None and self._alive_elsewhere(known, message.instance, now_s):
            code = Refusal.NOT_READY.value
            reason = f"another agent called {message.node} was alive just now; waiting for it to be silent"
        if code:
            return [Send(peer, m.Refused(message.request, code, reason))]
        effects: list[Effect] = []
        if known is None or known.instance != message.instance:
            if known is not None:
                self._lose(known, "its agent was started again", now_s, effects)
            drained = known.drained if known is not None else False
            node = Node(message.node, message.role, message.instance, facts, user, peer, now_s, drained=drained)
            self.nodes[message.node] = node
        else:
            known.peer, known.seen_s, known.lost, known.facts = peer, now_s, False, facts
        self.dirty_nodes.add(message.node)
        effects.append(Send(peer, m.Ack(message.request, 0)))
        return effects

    def heartbeat(self, peer: Peer, user: str, message: m.Heartbeat, now_s: float) -> list[Effect]:
        """A node is alive; what it has is compared with what it should have."""
        node = self._node(user, message.node, message.instance)
        if node is None:
            return [Send(peer, m.WhoAreYou())]
        effects: list[Effect] = []
        node.peer, node.seen_s = peer, now_s
        if node.lost:
            node.lost = False
            self.dirty_nodes.add(node.name)
        if message.document.get("draining") is True and not node.leaving:
            node.leaving = True
            self.dirty_nodes.add(node.name)
            self._drain_workers(node, now_s, effects)
        node.reported = reported_processes(message.document)
        self._reconcile(node, effects)
        return effects

    def process_ended(self, peer: Peer, user: str, message: m.ProcessEnded, now_s: float) -> list[Effect]:
        """A process of a job has ended on its node."""
        node = self._node(user, message.node, message.instance)
        record = self.jobs.get(message.job)
        if node is None or record is None:
            refusal = Refusal.NOT_READY if node is None else Refusal.UNKNOWN
            return [Send(peer, m.Refused(message.request, refusal.value, "no such node or job"))]
        document = message.document
        key = (message.role, message.index)
        process = record.life.processes.get(key)
        effects: list[Effect] = []
        if process is not None and process.epoch == message.epoch and process.node == node.name:
            code = document.get("code")
            stopped = document.get("stopped")
            error = str(document.get("error") or "")
            code = code if type(code) is int else None
            if stopped in ("agent", "orphaned"):
                process.leaving = process.replace = process.role == "worker"
                if process.role == "server":
                    code, error = None, error or "its host was shut down"
            lines = document.get("tail")
            tail = tuple(map(str, lines)) if isinstance(lines, list) else ()
            ended = record.life.ended(key, message.epoch, code, now_s, tail, error)
            self._job_effects(record, ended, now_s, effects)
            self.dirty_jobs.add(record.job)
        effects.append(Send(peer, m.Ack(message.request, 0)))
        return effects

    def node_leaving(self, peer: Peer, user: str, message: m.NodeLeaving, now_s: float) -> list[Effect]:
        """An agent ends; its processes have ended before."""
        effects: list[Effect] = []
        node = self._node(user, message.node, message.instance)
        if node is not None:
            self._lose(node, "its agent was stopped", now_s, effects)
            del self.nodes[node.name]
            self.dirty_nodes.add(node.name)
        effects.append(Send(peer, m.Ack(message.request, 0)))
        return effects

    def knows(self, user: str, node: str, instance: str) -> bool:
        """Whether this very agent has registered."""
        return self._node(user, node, instance) is not None

    def owns(self, user: str, message: m.LogData) -> bool:
        """Whether the output comes from a node that has had processes of the job."""
        record = self.jobs.get(message.job)
        node = self._node(user, message.node, message.instance)
        return record is not None and node is not None and node.name in record.nodes

    def _alive_elsewhere(self, known: Node, instance: str, now_s: float) -> bool:
        """Whether another agent of this name may still live."""
        if known.instance == instance or known.lost or known.leaving:
            return False
        return now_s - known.seen_s < self._node_timeout_s

    def _node(self, user: str, name: str, instance: str) -> Node | None:
        node = self.nodes.get(name)
        return node if node is not None and (node.instance, node.user) == (instance, user) else None

    def _reconcile(self, node: Node, effects: list[Effect]) -> None:
        wanted: set[tuple[str, str, int, int]] = set()
        for record in self.jobs.values():
            if record.over:
                if node.name in record.nodes:  # it is told once; what it still says of the job is refused
                    record.nodes.remove(node.name)
                    self.dirty_jobs.add(record.job)
                    effects.append(Send(node.peer, m.ForgetJob(record.job)))
                continue
            for process in record.life.processes.values():
                if process.node != node.name or not process.running:
                    continue
                key = (record.job, process.role, process.index, process.epoch)
                wanted.add(key)
                if process.stop is not None:
                    effects.append(self._stop_message(node, record, process))
                elif key not in node.reported:
                    effects.append(self._start_message(node, record, process))
        for key, line in node.reported.items():
            record_ = self.jobs.get(key[0])
            if record_ is None or record_.over:
                effects.append(Send(node.peer, m.ForgetJob(key[0])))
            elif key not in wanted and line.get("state") != "ended":
                effects.append(Send(node.peer, m.StopProcess(*key, 0.0)))

    def _lose(self, node: Node, why: str, now_s: float, effects: list[Effect]) -> None:
        """Nothing runs there any more, as far as anybody knows."""
        node.lost = True
        node.reported = {}
        self.dirty_nodes.add(node.name)
        for record in self.jobs.values():
            for key, process in list(record.life.processes.items()):
                if process.node == node.name and process.running:
                    error = f"lost with its host {node.name}: {why}"
                    ended = record.life.ended(key, process.epoch, None, now_s, (), error)
                    self._job_effects(record, ended, now_s, effects)
                    self.dirty_jobs.add(record.job)

    def drain(self, name: str, undo: bool, now_s: float) -> list[Effect]:
        """No more processes on this node, or again. Raises :class:`ConfigError` for an unknown one."""
        node = self.nodes.get(name)
        if node is None:
            raise ConfigError(f"there is no node called {name}")
        node.drained = not undo
        self.dirty_nodes.add(name)
        effects: list[Effect] = []
        if node.drained:
            self._drain_workers(node, now_s, effects)
        return effects

    def _drain_workers(self, node: Node, now_s: float, effects: list[Effect]) -> None:
        for record in self.jobs.values():
            keys = [k for k, p in record.life.processes.items() if p.node == node.name and p.running]
            self._job_effects(record, record.life.drain(keys, now_s), now_s, effects)

    # ------------------------------------------------------------ jobs

    def submit(self, record: JobRecord) -> None:
        """A new job joins the queue; its processes start when :meth:`tick` finds room."""
        self.jobs[record.job] = record
        self.dirty_jobs.add(record.job)

    def too_large(self, spec: JobSpec) -> str:
        """Why the cluster could not run this job even if it were idle, or ""."""
        found = place_gang(spec, self._rooms(None, idle=True), spec.fewest_workers, spec.fewest_workers)
        return found if isinstance(found, str) else ""

    def would_place(self, spec: JobSpec) -> dict[Key, Place] | str:
        """Where the job would run now, or why it would wait."""
        queued = [r.job for r in self.jobs.values() if r.life.phase is Phase.QUEUED]
        if queued:
            return f"{len(queued)} job(s) wait in the queue already"
        return place_gang(spec, self._rooms(None), spec.fewest_workers, spec.workers)

    def find(self, text: str) -> JobRecord:
        """By id, by the only beginning of one, or the newest of a name. Raises :class:`ConfigError`."""
        if text in self.jobs:
            return self.jobs[text]
        named = [r for r in self.jobs.values() if r.life.spec.name == text]
        if named:
            return max(named, key=lambda r: r.submitted_s)
        begun = sorted(job for job in self.jobs if text and job.startswith(text))
        if len(begun) > 1:
            raise ConfigError(f"{text} may be any of: {', '.join(begun)}")
        if not begun:
            raise LookupError(text)
        return self.jobs[begun[0]]

    def of_process(self, peer: Peer, message: Message, now_s: float) -> list[Effect]:
        """A message of a job's own process. Raises :class:`ProtocolError` for nonsense."""
        record = self.jobs.get(getattr(message, "job", ""))
        if record is None or record.over:
            request = getattr(message, "request", None)
            if request is None:
                return []
            return [Send(peer, m.Refused(request, Refusal.WRONG_JOB.value, "the job is over"))]
        asked = record.life.handle(peer, message, now_s)
        effects: list[Effect] = []
        if isinstance(message, m.Progress | m.ShardReport | m.SnapshotPart) and not record.over:
            # Told again soon enough, so not worth the journal, unless something follows from it.
            if asked and not isinstance(message, m.SnapshotPart):
                self.dirty_jobs.add(record.job)
            return [ForJob(record.job, asked)] if asked else []
        self._job_effects(record, asked, now_s, effects)
        self.dirty_jobs.add(record.job)
        return effects

    def cancel(self, record: JobRecord, now_s: float) -> list[Effect]:
        """End a job."""
        effects: list[Effect] = []
        self._job_effects(record, record.life.stop("CANCELLED", keep=False, now_s=now_s), now_s, effects)
        self._tell_stops(record, effects)
        self.dirty_jobs.add(record.job)
        return effects

    def scale(self, record: JobRecord, workers: int, now_s: float) -> list[Effect]:
        """Have another number of workers. Raises :class:`ConfigError`."""
        effects: list[Effect] = []
        self._job_effects(record, record.life.scale(workers, now_s), now_s, effects)
        self._tell_stops(record, effects)
        self.dirty_jobs.add(record.job)
        return effects

    def tick(self, now_s: float) -> list[Effect]:
        """Time passes: nodes may be lost, jobs go on, and those that wait may find room."""
        effects: list[Effect] = []
        for node in self.nodes.values():
            if not node.lost and now_s - node.seen_s > self._node_timeout_s:
                self._lose(node, f"no sign of life for {self._node_timeout_s:g} s", now_s, effects)
            if (node.drained or node.leaving) and not node.lost:
                self._drain_workers(node, now_s, effects)  # of jobs that had not begun to train when it was asked for
        for record in self.jobs.values():
            if not record.over:
                before = record.life.phase
                self._job_effects(record, record.life.tick(now_s), now_s, effects)
                if record.life.phase is not before:
                    self.dirty_jobs.add(record.job)
                self._tell_stops(record, effects)
        self._place_waiting(now_s, effects)
        return effects

    def _job_effects(self, record: JobRecord, asked: list[JobEffect], now_s: float, effects: list[Effect]) -> None:
        if asked:
            effects.append(ForJob(record.job, asked))
            self.dirty_jobs.add(record.job)
        if record.over and record.ended_s is None:
            record.ended_s = now_s
            self.dirty_jobs.add(record.job)

    def settle(self, job: str, now_s: float) -> None:
        """The job may have gone on by what was carried out for it."""
        self._job_effects(self.jobs[job], [], now_s, [])
        self.dirty_jobs.add(job)

    def _tell_stops(self, record: JobRecord, effects: list[Effect]) -> None:
        for process in record.life.stopping():
            node = self.nodes.get(process.node)
            key = (process.role, process.index, process.epoch)
            if node is not None and process.stop is not None and record.told.get(key) != process.stop:
                record.told[key] = process.stop
                effects.append(self._stop_message(node, record, process))
                self.dirty_jobs.add(record.job)

    # ------------------------------------------------------------ placing

    def _place_waiting(self, now_s: float, effects: list[Effect]) -> None:
        """Workers of running jobs first, then jobs that are started again, then the queue in its order.

        Nobody overtakes, so that large jobs have their turn.
        """
        for record in self.jobs.values():
            if record.life.phase is Phase.QUEUED:
                continue
            for keys in _together(record.life):
                others = {p.key: p.node for p in record.life.roster.servers() if p.running}
                found = place(record.life.spec, keys, self._rooms(record), others)
                if isinstance(found, str):
                    self._say(record, f"waiting for room: {found}")
                    break
                self._put(record, found, now_s, effects)
            else:
                self._say(record, "")
        blocked = ""
        for record in self.queue():
            life = record.life
            if blocked:
                self._say(record, f"waiting for its turn behind {blocked}")
                continue
            gang = place_gang(life.spec, self._rooms(record), life.fewest, life.wanted)
            if isinstance(gang, str):
                self._say(record, f"waiting for room: {gang}")
                blocked = record.job
                continue
            record.started_s = record.started_s or now_s
            workers = sum(1 for role, _ in gang if role == "worker")
            self._job_effects(record, life.begin(now_s, workers), now_s, effects)
            self._put(record, gang, now_s, effects)

    def queue(self) -> list[JobRecord]:
        """The jobs that wait for a place, those that are started again first."""
        waiting = [r for r in self.jobs.values() if r.life.phase is Phase.QUEUED]
        return sorted(waiting, key=lambda r: (r.started_s is None, r.submitted_s))

    def _put(self, record: JobRecord, places: dict[Key, Place], now_s: float, effects: list[Effect]) -> None:
        self._say(record, "")
        self.dirty_jobs.add(record.job)
        for key, where in places.items():
            record.life.placed(*key, where.node, now_s)
            process = record.life.processes[key]
            process.gpu = where.gpu
            if where.node not in record.nodes:
                record.nodes.append(where.node)
            effects.append(self._start_message(self.nodes[where.node], record, process))

    def _say(self, record: JobRecord, message: str) -> None:
        if record.message != message:
            record.message = message
            self.dirty_jobs.add(record.job)

    def _rooms(self, record: JobRecord | None, idle: bool = False) -> list[Room]:
        """What is free on the nodes that can be used; ``idle``: if nothing ran there."""
        rooms = {
            n.name: Room(
                n.name,
                n.role,
                n.facts["labels"],
                n.facts["slots"] if n.facts["slots"] > 0 or n.role == "worker" else -1,
                n.facts["memory_bytes"],
                list(range(n.facts["gpus"])) if n.role == "worker" else [],
                host=n.facts["host"],
            )
            for n in self.nodes.values()
            if n.usable
        }
        for other in self.jobs.values() if not idle else ():
            for process in other.life.processes.values():
                room = rooms.get(process.node)
                if room is None or not process.running:
                    continue
                room.used += 1
                room.slots -= 1 if room.slots > 0 else 0
                if process.role == "server":
                    room.memory_bytes -= other.life.spec.shard_memory
                    room.of_this_job += other is record
                elif process.gpu in room.gpus:
                    room.gpus.remove(process.gpu)
        return list(rooms.values())

    def _start_message(self, node: Node, record: JobRecord, process: Process) -> Send:
        document = start_document(record, process, self._coordinator_public)
        return Send(node.peer, m.StartProcess(record.job, process.role, process.index, process.epoch, document))

    def _stop_message(self, node: Node, record: JobRecord, process: Process) -> Send:
        grace_s = float(process.stop or 0.0)
        return Send(node.peer, m.StopProcess(record.job, process.role, process.index, process.epoch, grace_s))


def _together(life: Lifecycle) -> list[list[Key]]:
    """What a job has pending, in its order: a replica's workers together, everything else alone."""

    def unit(process: Process) -> Key:
        return process.role, process.index // (life.spec.ranks if process.role == "worker" else 1)

    return [[p.key for p in mates] for _, mates in itertools.groupby(life.pending(), unit)]


def start_document(record: JobRecord, process: Process, coordinator_public: str) -> dict[str, Any]:
    """What an agent is told about a process: ``StartProcess.document``."""
    facts, keys = record.life.training.facts, record.keys
    server = process.role == "server"
    resume, names = facts.resume, facts.resume_files
    training = record.life.training
    shard = training.shards[process.index % facts.shards]
    follows = server and training.follows(process.index)
    if follows:
        resume, names = "", ()
    elif server and shard.recovers:  # needs its own file, no other
        resume = record.life.checkpoints.folder(shard.checkpoint)
        names = (f"shard-{shard.index}.safetensors",)
    return {
        "spec": record.life.spec.model_dump(mode="json"),
        "bundle": record.bundle,
        "bundle_bytes": record.bundle_bytes,
        "workers": facts.workers,
        "coordinator": "",
        "fetch": [f"{resume}/{name}" for name in ("manifest.json", *names)] if resume and server else [],
        "keys": None
        if keys is None
        else {
            "coordinator": coordinator_public,
            "job": list(keys.processes),
            "shards": keys.shards[0],
            **({"shard_secret": keys.shards[1]} if server else {}),
        },
        "gpu": process.gpu,
        "threads": record.life.spec.threads,
        "shard_epoch": process.epoch if server else facts.shard_epoch,
        "resume": resume,
        "follows": follows,
        "term": shard.term,
    }


def record_document(record: JobRecord) -> dict[str, Any]:
    """All of a record that must survive the process, but for the model, as plain values."""
    return {
        "user": record.user,
        "token": record.token,
        "bundle": record.bundle,
        "bundle_bytes": record.bundle_bytes,
        "keys": [record.keys.processes, record.keys.shards] if record.keys else None,
        "submitted_s": record.submitted_s,
        "started_s": record.started_s,
        "ended_s": record.ended_s,
        "message": record.message,
        "nodes": record.nodes,
        "life": record.life.document(),
    }


def record_from(job: str, document: dict[str, Any], model: ModelSpec | None, now_s: float) -> JobRecord:
    """The inverse of :func:`record_document`."""
    keys = document["keys"]
    return JobRecord(
        job,
        document["user"],
        document["token"],
        document["bundle"],
        document["bundle_bytes"],
        Lifecycle.from_document(job, document["life"], model, now_s),
        JobKeys((keys[0][0], keys[0][1]), (keys[1][0], keys[1][1])) if keys else None,
        document["submitted_s"],
        document["started_s"],
        document["ended_s"],
        document["message"],
        list(document["nodes"]),
    )
