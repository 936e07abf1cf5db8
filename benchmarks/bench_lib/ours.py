"""Downpour with CURVE: one worker pushes the payload to one shard, which applies SGD, and gets the weights back.

``downpour run`` does not encrypt, a cluster would; so the processes are made here.

The same code as in a job: a session with its I/O thread, the shard's service, the coordinator. A run is one
``optimizer.step()``: it returns when every chunk's new weights are in the model's own memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bench_lib.child import RunOnce, Tell
from bench_lib.contender import ContenderError, Spec
from bench_lib.crew import Crew
from downpour.context import WorkerContext
from downpour.session import Session
from downpour_common import wire
from downpour_common.keys import ClientKeys, KeyPair, ServerKeys
from downpour_common.modes import parse_mode
from downpour_common.process import keep_freed_memory
from downpour_common.transport.zeromq import ZmqClient, ZmqServer, new_key_pair
from downpour_coordinator.effects import Send
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.training import Training
from downpour_server.config import ShardConfig
from downpour_server.service import ShardService, use_this_process

JOB = "bench"
MODE = "async"
CHUNK_BYTES = 2 << 20
LR = 1e-3
ENDPOINT = "tcp://127.0.0.1:0"


@dataclass(frozen=True)
class Keys:
    """What the three processes prove to each other."""

    coordinator: KeyPair
    shard: KeyPair
    worker: KeyPair


class CurveContender:
    """Three processes: coordinator, shard, worker; over loopback TCP with CURVE."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name = name
        self._spec = spec
        self._crew = Crew(name, spec.timeout_s)

    def start(self) -> None:
        timeout_s = self._spec.timeout_s
        keys = Keys(new_key_pair(), new_key_pair(), new_key_pair())
        self._crew.spawn("coordinator", coordinator, keys)
        address = self._crew.hear("coordinator")
        self._crew.spawn("shard", shard, address, timeout_s, keys)
        self._crew.spawn("worker", worker, address, self._spec.floats, timeout_s, keys)
        self._crew.await_ready()

    def run_once(self) -> float:
        return self._crew.run_once()["worker"]

    def close(self) -> None:
        self._crew.close()


@contextmanager
def coordinator(tell: Tell, keys: Keys) -> Iterator[RunOnce]:
    """The control plane, idle while runs are timed; tells its address."""
    accepted = ServerKeys(keys.coordinator, {keys.shard.public: "server", keys.worker.public: "worker"})
    transport = ZmqServer(ENDPOINT, wire.CONTROL_HEADER_LIMIT, accepted)
    tell(transport.address)
    facts = JobFacts(JOB, 1, 1, parse_mode(MODE), 0, CHUNK_BYTES)
    training = Training(facts)
    over = threading.Event()

    def pump() -> None:
        while not over.is_set():
            for peer, message in transport.poll(0.05):
                send(training.handle(peer, message))
        send(training.stop_shards())

    def send(effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                transport.send(effect.peer, effect.message)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield lambda: 0.0
    finally:
        over.set()
        thread.join()
        transport.close()


@contextmanager
def shard(_tell: Tell, coordinator_at: str, timeout_s: float, keys: Keys) -> Iterator[RunOnce]:
    """The shard; its service has a thread of its own, the main one only waits for the parent."""
    use_this_process(1)
    config = ShardConfig(
        job=JOB,
        shard=0,
        shard_epoch=0,
        coordinator=coordinator_at,
        endpoint=ENDPOINT,
        workers=1,
        shards=1,
        mode=MODE,
        chunk_bytes=CHUNK_BYTES,
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )
    accepted = ServerKeys(keys.shard, {keys.worker.public: "worker"})
    shown = ClientKeys(keys.shard, {}, keys.coordinator.public)
    control = ZmqClient(wire.CONTROL_HEADER_LIMIT, shown)

    def serve() -> None:
        with torch.no_grad():
            data = ZmqServer(config.endpoint, keys=accepted)
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
def worker(_tell: Tell, coordinator_at: str, floats: int, timeout_s: float, keys: Keys) -> Iterator[RunOnce]:
    """A replica whose model is one vector, and whose gradient is always one."""
    torch.set_num_threads(1)
    keep_freed_memory()
    context = WorkerContext(
        job=JOB,
        slot=0,
        worker_epoch=0,
        workers=1,
        shards=1,
        coordinator=coordinator_at,
        mode=MODE,
        device="cpu",
        seed=0,
        buffers="average",
        n_push=1,
        n_fetch=1,
        chunk_bytes=CHUNK_BYTES,
        window_bytes=16 << 20,
        shared_memory=False,
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(floats))})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    shown = ClientKeys(keys.worker, {coordinator_at: keys.coordinator.public}, keys.shard.public)
    session = Session(context, ZmqClient(wire.CONTROL_HEADER_LIMIT, shown))
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
