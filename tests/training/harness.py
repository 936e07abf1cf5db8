"""A whole job in one process: real sessions, shards and coordinator, each in a thread, over the in-memory transport.

Workers may join late, be asked to leave, be lost and be taken over; shards may be killed and come back; the coordinator
may lose messages and be restarted.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import downpour.client.thread
import downpour.control
import downpour_server.service
import downpour_server.upload
from downpour.context import WorkerContext
from downpour.drain import EXIT_CODE
from downpour.session import Session
from downpour_common import messages as m
from downpour_common.compensation import SPARE_BASES
from downpour_common.errors import ProtocolError
from downpour_common.messages import Message
from downpour_common.modes import parse_mode
from downpour_common.transport.memory import MemoryClient, MemoryNetwork
from downpour_coordinator.effects import LogRow, Send, StorePart, TrainingEffect
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed
from downpour_coordinator.training import Training
from downpour_server.config import ShardConfig
from downpour_server.effects import Effect
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


def repeat_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all processes repeat every few hundredths of a second what they repeat every few seconds."""
    monkeypatch.setattr(downpour.client.thread, "TICK_S", 0.01)
    monkeypatch.setattr(downpour.client.thread, "LOOK_S", 0.01)
    monkeypatch.setattr(downpour.client.thread, "REPEAT_S", 0.05)
    monkeypatch.setattr(downpour.control, "REPEAT_S", 0.05)
    monkeypatch.setattr(downpour_server.service, "REPORT_S", 0.05)
    monkeypatch.setattr(downpour_server.service, "REGISTER_S", 0.05)
    monkeypatch.setattr(downpour_server.upload, "ASK_S", 0.05)


Body = Callable[[Session], object]


class Killed(BaseException):
    """Raised by a body, or in a shard: the process ends here, without a word to anybody."""


class MortalClient(MemoryClient):
    """A worker's sockets. Once it has sent ``left`` more messages to shards it is as if the process had been killed:
    nothing leaves, nothing arrives, and ``on_death`` is called. -1: it lives."""

    def __init__(self, network: MemoryNetwork, name: bytes, on_death: Callable[[], object]) -> None:
        super().__init__(network, name)
        self.left = -1
        self.sent = 0
        """messages to shards"""
        self.dead = False
        self._on_death = on_death

    def send(self, server: str, message: Message) -> None:
        if self.left == 0 and server != "coordinator" and not self.dead:
            self.dead = True
            threading.Thread(target=self._on_death, daemon=True).start()
        if not self.dead:
            self.left -= self.left > 0 and server != "coordinator"
            self.sent += server != "coordinator"
            super().send(server, message)

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        arrived = super().poll(timeout_s)
        return [] if self.dead else arrived


class MortalShard(ShardService):
    """Dies where it would carry out what one of the next messages has brought, or before it is looked at."""

    left = -1
    """how often it still does; -1: it lives"""

    def _carry_out(self, effects: list[Effect]) -> None:
        if self.left == 0:
            raise Killed
        self.left -= self.left > 0
        super()._carry_out(effects)


@dataclass
class Job:
    """A job under way, and what it leaves behind for a test to look at. ``loss``: share of the messages to and from
    the coordinator that are lost. ``folder``: where shards write snapshots that they upload, or keep if ``keeps``.
    ``takes_over``: a worker that is killed in ``sync`` is replaced at once by another process, which goes on there.
    ``kills``: by slot, the numbers of messages to shards after which its processes are killed, one after the other."""

    context: WorkerContext
    body: Body
    training: Training
    results: dict[int, object] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    clients: dict[int, MortalClient] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[CommitSnapshot | SnapshotFailed] = field(default_factory=list)
    files: dict[tuple[int, str], bytearray] = field(default_factory=dict)
    loss: float = 0.0
    lost: int = 0
    folder: str = ""
    keeps: bool = False
    takes_over: bool = False
    compensation: str = "off"
    kills: dict[int, list[int]] = field(default_factory=dict)
    deaths: int = 0
    services: dict[int, MortalShard] = field(default_factory=dict)
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

    def start_worker(
        self, slot: int, epoch: int = 0, body: Body | None = None, announce: Callable[[int, int], object] | None = None
    ) -> None:
        """A worker process for ``slot``; not one of the first is announced to the coordinator before."""
        if slot >= self.context.workers or epoch:
            self.call(lambda: (announce or self.training.expect)(slot, epoch))

        def close() -> None:
            session._thread.close()

        client = MortalClient(self.network, f"worker-{slot}.{epoch}".encode(), close)
        session = Session(replace(self.context, slot=slot, worker_epoch=epoch), client)
        if self.kills.get(slot):
            client.left = self.kills[slot].pop(0)
        self.sessions[slot], self.clients[slot] = session, client
        arguments = (slot, session, client, body or self.body)
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

    def kill_shard(self, index: int, after: int, checkpoint: int) -> None:
        """Kill it after so many effects from now on, and have another process come back from a checkpoint of
        :meth:`snapshot`; ``folder`` and ``keeps`` must be set. Nothing is killed that has no more to do."""
        thread, epoch = self._shards[index], self.services[index]._config.shard_epoch + 1
        self.services[index].left = after
        deadline_s = time.monotonic() + LONG_S
        while thread.is_alive():
            assert time.monotonic() < deadline_s, "it does not die"
            if not any(worker.is_alive() for worker in self._workers):
                return
            threading.Event().wait(0.002)
        self.deaths += 1
        self.call(lambda: self.training.shard_lost(index, epoch))
        self._start_shard(index, epoch)
        self.call(lambda: self._carry_out(self.training.shard_resumes(index, checkpoint)))

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
            self._start_shard(index)
        self._coordinator.start()
        for slot in range(self.context.workers):
            self.start_worker(slot)
        try:
            yield
        finally:
            for thread in self._workers:  # those included that are started meanwhile
                thread.join(LONG_S)
            self._trained.set()
            self._coordinator.join(20)
        assert not any(t.is_alive() for t in [*self._workers, *self._shards, self._coordinator])
        for error in self.errors.values():
            raise error

    def _start_shard(self, index: int, epoch: int = 0) -> None:
        c = self.context
        address = f"server-{index}" + (f".{epoch}" if epoch else "")
        config = ShardConfig(
            c.job,
            index,
            epoch,
            "coordinator",
            address,
            c.workers,
            c.shards,
            c.mode,
            c.chunk_bytes,
            c.timeout_s,
            c.start_timeout_s,
            folder=self.folder,
            upload=bool(self.folder) and not self.keeps,
            push_dtype=c.push_dtype,
            keep_previous=self.takes_over,
            skip_non_finite=c.on_nan != "fail",
            compress=c.compress,
            compensation=self.compensation,
            bases=SPARE_BASES + c.inject_staleness,
            warm_start=c.warm_start,
        )
        data = self.network.server(address)
        service = self.services[index] = MortalShard(config, data, self.network.client())

        def serve() -> None:
            try:
                service.run()
            except Killed:
                data.close()

        thread = threading.Thread(target=serve, name=address, daemon=True)
        self._shards[index:] = [thread, *self._shards[index + 1 :]]
        thread.start()

    def _work(self, slot: int, session: Session, client: MortalClient, body: Body) -> None:
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
            if not client.dead:
                self.errors[slot] = error
                session.fail(error, "")
                return
            session._closed = True
            self.deaths += 1
            if self.takes_over and not self.training.workers[slot].gone:
                self.start_worker(slot, session.context.worker_epoch + 1, body, self.training.take_over)
            else:
                self.lose(slot)

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
                    if self.keeps and isinstance(effect, CommitSnapshot):
                        path = os.path.join(self.folder, f"checkpoints/{effect.number}", "manifest.json")
                        with open(path, "w", encoding="utf-8") as file:
                            json.dump(effect.manifest, file)
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
    facts = replace(facts, chunk_bytes=context.chunk_bytes, ranks=context.ranks)
    return Job(context, body, Training(facts, "checkpoints/{}".format))


def run_job(body: Body, context: WorkerContext = CONTEXT) -> Job:
    """Run ``body(session)`` in ``context.workers`` threads; raises the first worker's error."""
    job = make_job(body, context)
    with job.running():
        pass
    return job
