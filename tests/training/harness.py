"""A whole job in one process: real sessions, shards and coordinator, each in a thread, over the in-memory transport."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from downpour.context import WorkerContext
from downpour.session import Session
from downpour_common.modes import parse_mode
from downpour_common.transport.memory import MemoryNetwork
from downpour_coordinator.service import CoordinatorService
from downpour_coordinator.state import Coordinator, JobFacts
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


@dataclass
class Job:
    """What a run leaves behind for a test to look at."""

    coordinator: Coordinator
    results: dict[int, object] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)


def run_job(body: Callable[[Session], object], context: WorkerContext = CONTEXT) -> Job:
    """Run ``body(session)`` in ``context.workers`` threads; raises the first worker's error."""
    network = MemoryNetwork()
    transport = network.server("coordinator")
    facts = JobFacts(
        "test", context.workers, context.shards, parse_mode(context.mode), context.seed, context.chunk_bytes
    )
    service = CoordinatorService(Coordinator(facts), transport, io.StringIO(), lambda *_: None)
    job = Job(service.state)
    trained = threading.Event()

    def coordinate() -> None:
        while not trained.is_set():
            service.pump(0.005)
        service.carry_out(service.state.stop_shards())
        for thread in shards:
            thread.join(10)
        service.pump()

    def work(slot: int) -> None:
        session = Session(replace(context, slot=slot), network.client())
        try:
            job.results[slot] = body(session)
            session.finish()
        except BaseException as error:
            job.errors[slot] = error
            session.fail(error, "")

    shards = []
    for index in range(context.shards):
        config = ShardConfig(
            "test",
            index,
            0,
            "coordinator",
            f"server-{index}",
            context.workers,
            context.shards,
            context.mode,
            context.chunk_bytes,
            context.timeout_s,
            context.start_timeout_s,
        )
        shard = ShardService(config, network.server(f"server-{index}"), network.client())
        shards.append(threading.Thread(target=shard.run, name=f"server-{index}"))
    workers = [threading.Thread(target=work, args=(slot,), name=f"worker-{slot}") for slot in range(context.workers)]
    control = threading.Thread(target=coordinate, name="coordinator")
    for thread in [*shards, control, *workers]:
        thread.start()
    for thread in workers:
        thread.join(100)
    trained.set()
    control.join(20)
    assert not any(t.is_alive() for t in [*workers, *shards, control])
    for error in job.errors.values():
        raise error
    return job
