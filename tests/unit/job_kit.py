"""A coordinator made of dictionaries, and two ways to reach it: without sockets under a fake clock, and over ZeroMQ."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from downpour.jobs.access import Access
from downpour.jobs.client import ClusterClient
from downpour_common import wire
from downpour_common.keys import ServerKeys
from downpour_common.messages import (
    Ack,
    CancelJob,
    CheckpointNow,
    DescribeJob,
    Document,
    DrainNode,
    FileData,
    GetFile,
    ListFiles,
    ListJobs,
    ListNodes,
    Message,
    PutBundle,
    Refused,
    Reply,
    Request,
    ScaleJob,
    SubmitJob,
)
from downpour_common.transport.zeromq import ZmqServer

ADDRESS = "tcp://127.0.0.1:7000"


def job_document(job: str = "digits-3f2a9c", state: str = "RUNNING", **fields: Any) -> Document:
    """A job as a coordinator describes it."""
    return {
        "job": job,
        "name": job.rpartition("-")[0],
        "user": "user/alice",
        "state": state,
        "reason": "",
        "message": "",
        "failure": None,
        "submitted_s": 1767323045.0,
        "started_s": 1767323046.0,
        "ended_s": None,
        "elapsed_s": 41.0,
        "waiting_for": [],
        "waiting_s": 0.0,
        "position": 0,
        "workers": {"wanted": 2, "live": 2, "min": 2},
        "shards": 1,
        "mode": "sync",
        "restarts": 0,
        "restarts_limit": 0,
        "clock": 120,
        "epoch": 2,
        "samples": 7680,
        "samples_per_s": 1234.5,
        "metrics": {"loss": 0.25},
        "staleness": {"p50": 0, "p99": 1, "max": 2},
        "degraded": "",
        "warnings": [],
        "result": None,
        "exit_code": None,
        "processes": [],
        "spec": {},
        "checkpoints": [],
        "model": False,
        **fields,
    }


FAILURE = {
    "role": "worker",
    "index": 1,
    "epoch": 0,
    "host": "node-b",
    "exit_code": 1,
    "message": "ValueError: no data",
    "details": 'Traceback (most recent call last):\n  File "train.py", line 7\nValueError: no data',
}


class FakeCoordinator:
    """Answers as its dictionaries say."""

    def __init__(self, *jobs: Document) -> None:
        self.jobs = {str(document["job"]): document for document in jobs}
        self.nodes: list[Document] = []
        self.wishes: list[Document] = []
        """what is answered to wishes for checkpoints, in turn; the last one for ever"""
        self.files: dict[str, bytes] = {}
        self.bundles: dict[str, bytearray] = {}
        self.heard: list[Message] = []
        self.refuse: dict[type[Request], tuple[str, str]] = {}
        self.before: Callable[[Message], None] = lambda _message: None
        """called with each request before it is answered; a test changes the world here"""
        self._tokens: dict[str, str] = {}

    def of(self, *kinds: type[Message]) -> list[Any]:
        """The requests of these types, in the order they came."""
        return [message for message in self.heard if isinstance(message, kinds)]

    def answer(self, message: Message) -> Message:
        """What a coordinator would say."""
        assert isinstance(message, Request)
        self.heard.append(message)
        self.before(message)
        number = message.request
        if type(message) in self.refuse:
            return Refused(number, *self.refuse[type(message)])
        match message:
            case ListJobs():
                return Reply(number, {"jobs": list(self.jobs.values())})
            case ListNodes():
                return Reply(number, {"nodes": self.nodes, "coordinator": {"version": "0", "security": "none"}})
            case PutBundle():
                return Ack(number, self._take(message))
            case SubmitJob():
                return self._submit(message)
            case DrainNode():
                known = [node for node in self.nodes if node["node"] == message.node]
                if not known:
                    return Refused(number, "unknown", f"no node {message.node}")
                return Reply(number, {**known[0], "state": "READY" if message.undo else "DRAINING"})
            case GetFile():
                if message.path not in self.files:
                    return Refused(number, "unknown", f"no file {message.path}")
                data = self.files[message.path]
                part = data[message.offset : message.offset + message.length]
                return FileData(number, len(data), message.offset, part)
            case CheckpointNow():
                return Reply(number, self.wishes.pop(0) if len(self.wishes) > 1 else self.wishes[0])
            case DescribeJob() | CancelJob() | ScaleJob() | ListFiles():
                return self._about(message)
        raise AssertionError(message)

    def _about(self, message: DescribeJob | CancelJob | ScaleJob | ListFiles) -> Message:
        known = [d for key, d in self.jobs.items() if key.startswith(message.job) or d["name"] == message.job]
        if not known:
            return Refused(message.request, "unknown", f"no job {message.job}")
        document = known[0]
        match message:
            case ListFiles():
                return Reply(message.request, {"files": [[path, len(data)] for path, data in self.files.items()]})
            case CancelJob() if document["state"] == "RUNNING":
                document["state"] = "STOPPING"
            case ScaleJob():
                document["workers"]["wanted"] = message.workers
        return Reply(message.request, document)

    def _take(self, message: PutBundle) -> int:
        held = self.bundles.setdefault(message.digest, bytearray())
        if message.offset == len(held):
            held += bytes(message.payload)
        return len(held)

    def _submit(self, message: SubmitJob) -> Message:
        spec = message.document["spec"]
        if message.document["dry_run"]:
            placement = [{"role": "server", "index": 0, "node": "node-a"}, {"role": "worker", "index": 0, "node": "b"}]
            facts = {"dry_run": True, "fits": True, "message": "would start now", "placement": placement}
            return Reply(message.request, {**facts, "spec": spec, "warnings": []})
        job = self._tokens.setdefault(message.token, f"{spec['name']}-{len(self._tokens)}")
        self.jobs.setdefault(job, job_document(job, "PENDING", position=1, message="", spec=spec))
        return Reply(message.request, self.jobs[job])


class Clock:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.at: list[tuple[float, Callable[[], None]]] = []

    def now(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds
        due = [entry for entry in self.at if entry[0] <= self.now_s]
        self.at = [entry for entry in self.at if entry not in due]
        for _, action in due:
            action()


class Line:
    """The transport between one client and a coordinator under a fake clock; what it carries can be cut and delayed."""

    def __init__(self, coordinator: FakeCoordinator, clock: Clock) -> None:
        self.coordinator = coordinator
        self.clock = clock
        self.malformed = 0
        self.cut = False
        """nothing arrives"""
        self.deaf = 0
        """so many answers are lost"""
        self.problem = ""
        self.opened = 0
        self.closed = 0
        self._inbox: list[tuple[str, Message]] = []

    def connect(self, where: Access) -> Line:
        self.opened += 1
        return self

    def send(self, server: str, message: Message) -> None:
        if self.cut:
            return
        answer = self.coordinator.answer(wire.decode([bytes(frame) for frame in wire.encode(message)], 1 << 26))
        if self.deaf:
            self.deaf -= 1
            return
        self._inbox.append((server, answer))

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        arrived, self._inbox = self._inbox, []
        if not arrived:
            self.clock.pass_(max(timeout_s, 0.01))
        return arrived

    def trouble(self, server: str) -> str:
        return self.problem

    def wake(self) -> None:
        raise AssertionError("the client has one thread")

    def close(self) -> None:
        self.closed += 1

    def client(self, timeout_s: float = 10.0) -> ClusterClient:
        return ClusterClient(
            ADDRESS, None, None, timeout_s, connect=self.connect, now=self.clock.now, pause=self.clock.pass_
        )


def line_to(*jobs: Document) -> Line:
    """A coordinator that has these jobs, and the line to it."""
    return Line(FakeCoordinator(*jobs), Clock())


@contextmanager
def served(coordinator: FakeCoordinator, keys: ServerKeys | None = None, address: str = "127.0.0.1:*") -> Iterator[str]:
    """``coordinator`` on a free port of 127.0.0.1 (or at ``address``), in a thread; gives HOST:PORT."""
    server = ZmqServer(f"tcp://{address}", wire.CONTROL_HEADER_LIMIT, keys)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for peer, message in server.poll(0.02):
                server.send(peer, coordinator.answer(message))
        server.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.address.removeprefix("tcp://")
    finally:
        stop.set()
        thread.join()
