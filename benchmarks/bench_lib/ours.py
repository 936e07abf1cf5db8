"""Downpour itself: one worker pushes the payload to one shard, which applies SGD, and gets the weights back.

The same code as in a job: a session with its I/O thread, the shard's service, the coordinator. A run is one
``optimizer.step()``: it returns when every chunk's new weights are in the model's own memory.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bench_lib.child import RunOnce, Tell
from bench_lib.contender import ContenderError, Spec
from bench_lib.crew import Crew
from downpour.context import WorkerContext
from downpour.session import Session
from downpour_common import wire
from downpour_common.modes import parse_mode
from downpour_common.process import keep_freed_memory
from downpour_common.transport.zeromq import ZmqClient, ZmqServer
from downpour_coordinator.service import CoordinatorService
from downpour_coordinator.state import Coordinator, JobFacts
from downpour_server.config import ShardConfig
from downpour_server.service import ShardService, use_this_process

JOB = "bench"
MODE = "async"
CHUNK_BYTES = 1 << 20
LR = 1e-3


class DownpourContender:
    """Three processes: coordinator, shard, worker; over ``ipc://`` as ``downpour run`` does.

    With ``shared``, gradient and weights lie in memory that both map, and only headers are sent.
    """

    def __init__(self, name: str, spec: Spec, *, shared: bool) -> None:
        self.name = name
        self._spec = spec
        self._shared = shared
        self._crew = Crew(name, spec.timeout_s)
        self._folder = tempfile.TemporaryDirectory(prefix="downpour-bench-")

    def start(self) -> None:
        folder, timeout_s = self._folder.name, self._spec.timeout_s
        self._crew.spawn("coordinator", coordinator, folder)
        self._crew.spawn("shard", shard, folder, timeout_s)
        self._crew.spawn("worker", worker, folder, self._spec.floats, timeout_s, self._shared)
        self._crew.await_ready()

    def run_once(self) -> float:
        return self._crew.run_once()["worker"]

    def close(self) -> None:
        self._crew.close()
        self._folder.cleanup()


def address(folder: str, name: str) -> str:
    """The socket of a process."""
    return f"ipc://{os.path.join(folder, name)}"


@contextmanager
def coordinator(_tell: Tell, folder: str) -> Iterator[RunOnce]:
    """The control plane, idle while runs are timed."""
    transport = ZmqServer(address(folder, "coordinator"), wire.CONTROL_HEADER_LIMIT)
    facts = JobFacts(JOB, 1, 1, parse_mode(MODE), 0, CHUNK_BYTES)
    service = CoordinatorService(Coordinator(facts), transport, io.StringIO(), lambda *_: None)
    over = threading.Event()

    def pump() -> None:
        while not over.is_set():
            service.pump(0.05)
        service.carry_out(service.state.stop_shards())

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield lambda: 0.0
    finally:
        over.set()
        thread.join()
        transport.close()


@contextmanager
def shard(_tell: Tell, folder: str, timeout_s: float) -> Iterator[RunOnce]:
    """The shard; its service has a thread of its own, the main one only waits for the parent."""
    use_this_process(1)
    config = ShardConfig(
        job=JOB,
        shard=0,
        shard_epoch=0,
        coordinator=address(folder, "coordinator"),
        endpoint=address(folder, "shard"),
        workers=1,
        shards=1,
        mode=MODE,
        chunk_bytes=CHUNK_BYTES,
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )
    control = ZmqClient(wire.CONTROL_HEADER_LIMIT)

    def serve() -> None:
        with torch.no_grad():
            data = ZmqServer(config.endpoint)
            try:
                ShardService(config, data, control).run()
            finally:
                data.close()
                control.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield lambda: 0.0
    thread.join(2.0)


@contextmanager
def worker(_tell: Tell, folder: str, floats: int, timeout_s: float, shared: bool) -> Iterator[RunOnce]:
    """A replica whose model is one vector, and whose gradient is always one."""
    torch.set_num_threads(1)
    keep_freed_memory()
    context = WorkerContext(
        job=JOB,
        slot=0,
        worker_epoch=0,
        workers=1,
        shards=1,
        coordinator=address(folder, "coordinator"),
        mode=MODE,
        device="cpu",
        seed=0,
        buffers="average",
        n_push=1,
        n_fetch=1,
        chunk_bytes=CHUNK_BYTES,
        window_bytes=16 << 20,
        shared_memory=shared,
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(floats))})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    session = Session(context, ZmqClient(wire.CONTROL_HEADER_LIMIT))
    session.prepare(model, optimizer, [])
    weights = model["w"]
    assert weights.grad is not None
    weights.grad.fill_(1.0)
    steps = 0

    def run_once() -> float:
        nonlocal steps
        start = time.perf_counter()
        optimizer.step()
        took_s = time.perf_counter() - start
        steps += 1
        for value in (weights[0].item(), weights[-1].item()):
            if abs(value + LR * steps) > 1e-3 * LR * steps:
                raise ContenderError(f"wrong weights after {steps} steps: {value}")
        return took_s

    try:
        yield run_once
    finally:
        session.finish()
