"""A whole job in one process: real sessions, shards and coordinator, each in a thread, over the in-memory transport.

Workers may join late, be asked to leave, and be lost; the coordinator may lose messages and be restarted.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from downpour.context import WorkerContext
from downpour.drain import EXIT_CODE
from downpour.session import Session
from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.modes import parse_mode
from downpour_common.transport.memory import MemoryNetwork
from downpour_coordinator.effects import LogRow, Send, StorePart, TrainingEffect
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed
from downpour_coordinator.training import Training
from downpour_server.config import ShardConfig
from downpour_server.service import ShardService

CONTEXT = WorkerContext(
    job="test",
    slot=0,
    worker_epoch=0,
    workers=1,
    shards=1,
    coordinator="coordinator",
    mode="sync",
    device="cpu",
    seed=0,
    buffers="average",
    n_push=1,
    n_fetch=1,
    chunk_bytes=1024,
    window_bytes=1 << 20,
    shared_memory=True,
    timeout_s=30.0,
    start_timeout_s=30.0,
)
LONG_S = 40.0
Body = Callable[[Session], object]


class Killed(BaseException):
    """Raised by a body: the worker's process ends here, without a word to anybody."""


@dataclass
class Job:
    """A job under way, and what it leaves behind for a test to look at. ``loss``: share of the messages to and from
    the coordinator that are lost. ``folder``: where shards write snapshots that they upload."""

    context: WorkerContext
    body: Body
    training: Training
    results: dict[int, object] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[CommitSnapshot | SnapshotFailed] = field(default_factory=list)
    files: dict[tuple[int, str], bytearray] = field(default_factory=dict)
    loss: float = 0.0
    lost: int = 0
    folder: str = ""
    network: MemoryNetwork = field(default_factory=MemoryNetwork)

    def __post_init__(self) -> None:
        self._transport = self.network.server("coordinator")
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        self._random = random.Random(7)
        self._trained = threading.Event()
        self._workers: list[threading.Thread] = []
        self._shards: list[threading.Thread] = []
        self._coordinator = threading.Thread(target=self._coordinate, name="coordinator", daemon=True)

    # ------------------------------------------------------------ what a test may do while it runs

    def start_worker(self, slot: int, epoch: int = 0, body: Body | None = None) -> None:
        """A worker process for ``slot``; not one of the first is announced to the coordinator before."""
        if slot >= self.context.workers or epoch:
            self.call(lambda: self.training.expect(slot, epoch))
        session = Session(replace(self.context, slot=slot, worker_epoch=epoch), self.network.client())
        self.sessions[slot] = session
        arguments = (slot, session, body or self.body)
        thread = threading.Thread(target=self._work, args=arguments, name=f"worker-{slot}", daemon=True)
        self._workers.append(thread)
        thread.start()

    def lose(self, slot: int) -> None:
        """The coordinator is told that the process of ``slot`` has ended."""
        self.call(lambda: self._carry_out(self.training.worker_lost(slot)))

    def snapshot(self, number: int, final: bool = False) -> None:
        """Have one taken; see ``snapshots`` and ``files``. Asked for again until it is there."""
        self.call(lambda: self._carry_out(self.training.begin_snapshot(number, f"checkpoints/{number}", final)))
        deadline_s = time.monotonic() + LONG_S
        while not any(s.number == number for s in self.snapshots):
            assert time.monotonic() < deadline_s, "no snapshot"
            threading.Event().wait(0.01)
            self.call(lambda: self._carry_out(self.training.repeat_snapshot()))

    def restart_coordinator(self) -> None:
        """Another process with what was durable; what was on its way is lost, and nobody's address is known."""

        def restart() -> None:
            document = json.loads(json.dumps(self.training.document()))
            self.training = Training.from_document(document, self.training.model)
            self._transport.peers.clear()
            while self._transport.poll(0):
                self.lost += 1

        self.call(restart)

    def call(self, function: Callable[[], object]) -> None:
        """Run this in the coordinator's thread, and wait for it."""
        done = threading.Event()
        self._calls.put((function, done))
        assert done.wait(LONG_S)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Until it is so; ``what`` for the error."""
        deadline_s = time.monotonic() + LONG_S
        while not condition():
            assert time.monotonic() < deadline_s, f"no {what}"
            assert not self.errors, self.errors
            threading.Event().wait(0.002)

    # ------------------------------------------------------------ threads

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start everything; at the end, wait for the workers, stop the shards, and raise the first worker's error."""
        for index in range(self.context.shards):
            service = self._shard(index)
            self._shards.append(threading.Thread(target=service.run, name=f"server-{index}", daemon=True))
        for thread in [*self._shards, self._coordinator]:
            thread.start()
        for slot in range(self.context.workers):
            self.start_worker(slot)
        try:
            yield
        finally:
            for thread in self._workers:
                thread.join(LONG_S)
            self._trained.set()
            self._coordinator.join(20)
        assert not any(t.is_alive() for t in [*self._workers, *self._shards, self._coordinator])
        for error in self.errors.values():
            raise error

    def _shard(self, index: int) -> ShardService:
        c = self.context
        config = ShardConfig(
            c.job,
            index,
            0,
            "coordinator",
            f"server-{index}",
            c.workers,
            c.shards,
            c.mode,
            c.chunk_bytes,
            c.timeout_s,
            c.start_timeout_s,
            folder=self.folder,
            upload=bool(self.folder),
            push_dtype=c.push_dtype,
        )
        return ShardService(config, self.network.server(f"server-{index}"), self.network.client())

    def _work(self, slot: int, session: Session, body: Body) -> None:
        try:
            try:
                self.results[slot] = body(session)
            except SystemExit as left:
                if left.code != EXIT_CODE:
                    raise
            session.finish()
        except Killed:
            session._closed = True
            session._thread.close()
            self.lose(slot)
        except BaseException as error:
            self.errors[slot] = error
            session.fail(error, "")

    def _coordinate(self) -> None:
        try:
            while not self._trained.is_set():
                self._pump(0.005)
        except Exception as error:
            self.errors[-1] = error
            raise
        self.loss = 0.0
        self._carry_out(self.training.stop_shards())
        for thread in self._shards:
            thread.join(10)
        self._pump(0.0)

    def _pump(self, timeout_s: float) -> None:
        while True:
            while not self._calls.empty():
                function, done = self._calls.get()
                function()
                done.set()
            arrived = self._transport.poll(timeout_s)
            timeout_s = 0.0
            if not arrived:
                return
            for peer, message in arrived:
                if not self._loses():
                    try:
                        self._carry_out(self.training.handle(peer, message))
                    except ProtocolError:
                        self._transport.malformed += 1

    def _loses(self) -> bool:
        lost = self._random.random() < self.loss
        self.lost += lost
        return lost

    def _carry_out(self, effects: list[TrainingEffect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    if not self._loses():
                        self._transport.send(effect.peer, effect.message)
                case LogRow():
                    self.rows.append(effect.row)
                case CommitSnapshot() | SnapshotFailed():
                    self.snapshots.append(effect)
                case StorePart(peer, part):
                    held = self.files.setdefault((part.snapshot, part.name), bytearray())
                    if part.offset == len(held):
                        held += part.payload
                    if not self._loses():
                        self._transport.send(peer, m.Ack(part.request, len(held)))


def make_job(body: Body, context: WorkerContext = CONTEXT) -> Job:
    """A job that is not running yet."""
    facts = JobFacts("test", context.workers, context.shards, parse_mode(context.mode), context.seed, 1024)
    return Job(context, body, Training(replace(facts, chunk_bytes=context.chunk_bytes)))


def run_job(body: Body, context: WorkerContext = CONTEXT) -> Job:
    """Run ``body(session)`` in ``context.workers`` threads; raises the first worker's error."""
    job = make_job(body, context)
    with job.running():
        pass
    return job
