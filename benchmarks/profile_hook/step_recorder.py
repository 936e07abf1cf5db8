"""Times functions of a running job from outside: each is replaced by one that also takes the time.

Loaded into the job's processes by :mod:`sitecustomize`, so production code has no hooks. A function's own time is that
without the timed functions that it calls. What was recorded is written when the process ends.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

VARIABLE = "BENCH_PROFILE"
"""Folder that the records go to."""


@dataclass(frozen=True)
class Seam:
    """A function that is timed, as ``side`` (worker or shard) sees it, and what its own time is called."""

    side: str
    module: str
    name: str
    phase: str


SEAMS = (
    Seam("worker", "downpour.session", "Session.step", "step, all the rest"),
    Seam("worker", "downpour.space", "FlatSpace.gather_gradients", "gather gradients"),
    Seam("worker", "downpour.client.parameters", "ParameterClient.add_push_pull", "make requests"),
    Seam("worker", "downpour.client.parameters", "ParameterClient._take_weights", "take weights"),
    Seam("worker", "downpour.client.core", "Ticket.wait", "see to answers"),
    Seam("worker", "downpour_common.transport.zeromq", "ZmqClient.send", "send"),
    Seam("worker", "downpour_common.transport.zeromq", "ZmqClient.poll", "wait and receive"),
    Seam("shard", "downpour_common.transport.zeromq", "ZmqServer.poll", "wait and receive"),
    Seam("shard", "downpour_common.transport.zeromq", "ZmqServer.send", "send"),
    Seam("shard", "downpour_server.service", "ShardService._take_control", "control and reports"),
    Seam("shard", "downpour_server.service", "ShardService._report", "control and reports"),
    Seam("shard", "downpour_server.shard", "Shard.handle", "identity, order, options"),
    Seam("shard", "downpour_server.contributions", "is_finite", "check for NaN"),
    Seam("shard", "downpour_server.store", "StoredChunk.apply", "apply, all the rest"),
    Seam("shard", "downpour_server.store", "weighted_mean", "mean of a round"),
    Seam("shard", "downpour_server.rules.torch_rules", "TorchRule.apply", "update rule"),
    Seam("shard", "downpour_server.attached", "Lodging.answer", "copy weights to a worker"),
)


class Recorder:
    """What one process did: (phase, thread, end, own seconds, own seconds on the processor) per call."""

    def __init__(self) -> None:
        self.side = "worker"
        self.rank = 0
        self.events: list[tuple[str, str, float, float, float]] = []
        self.steps: list[float] = []
        """when the training loop began each step, and when it ended the last"""
        self.missing: list[str] = []
        self._local = threading.local()

    def enter(self) -> tuple[list[float], float, float]:
        """Begin to take the time; for :meth:`leave`."""
        stack: list[list[float]] = self._local.__dict__.setdefault("stack", [])
        inner = [0.0, 0.0]
        stack.append(inner)
        return inner, time.monotonic(), time.thread_time()

    def leave(self, phase: str, entered: tuple[list[float], float, float]) -> None:
        """End what :meth:`enter` began. What it took counts for ``phase``, but for what was timed inside."""
        (inner_s, inner_cpu_s), began_s, began_cpu_s = entered
        ended_s = time.monotonic()
        took_s, took_cpu_s = ended_s - began_s, time.thread_time() - began_cpu_s
        stack: list[list[float]] = self._local.stack
        stack.pop()
        if stack:
            stack[-1][0] += took_s
            stack[-1][1] += took_cpu_s
        thread = threading.current_thread().name
        self.events.append((phase, thread, ended_s, took_s - inner_s, took_cpu_s - inner_cpu_s))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts for ``name``."""
        entered = self.enter()
        try:
            yield
        finally:
            self.leave(name, entered)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``function``, with its calls recorded."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            entered = self.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(name, entered)

        return wrapper

    def write(self, folder: str) -> None:
        """One file per process."""
        document = {
            "side": self.side,
            "rank": self.rank,
            "events": self.events,
            "steps": self.steps,
            "missing": self.missing,
        }
        with open(os.path.join(folder, f"{self.side}-{os.getpid()}.json"), "w", encoding="utf-8") as file:
            json.dump(document, file)


recorder = Recorder()


def begin() -> None:
    """Record this process if it is one of the job's: a shard, or a worker with its script."""
    environment = os.environ
    if "DOWNPOUR_SHARD" in environment:
        recorder.side = "shard"
        recorder.rank = int(json.loads(environment["DOWNPOUR_SHARD"])["shard"])
    elif "DOWNPOUR_WORKER" in environment:
        recorder.rank = int(json.loads(environment["DOWNPOUR_WORKER"])["slot"])
    else:
        return
    seams = [seam for seam in SEAMS if seam.side == recorder.side]
    sys.meta_path.insert(0, _Finder({seam.module: [s for s in seams if s.module == seam.module] for seam in seams}))
    folder = environment[VARIABLE]
    owner = os.getpid()
    atexit.register(lambda: recorder.write(folder) if os.getpid() == owner else None)


def instrument(module: ModuleType, seams: Sequence[Seam], record: Recorder) -> None:
    """Replace the functions that ``seams`` name in ``module``; a name that is not there is noted."""
    for seam in seams:
        holder: Any = module
        *path, name = seam.name.split(".")
        for part in path:
            holder = getattr(holder, part, None)
        function = getattr(holder, name, None)
        if function is None:
            record.missing.append(f"{seam.module}.{seam.name}")
        else:
            setattr(holder, name, record.timed(function, seam.phase))


class _Finder(importlib.abc.MetaPathFinder):
    """Has modules instrumented once they have been executed."""

    def __init__(self, seams: dict[str, list[Seam]]) -> None:
        self._seams = seams

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._seams:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute, seams = spec.loader.exec_module, self._seams[fullname]

            def execute_and_instrument(module: ModuleType) -> None:
                execute(module)
                instrument(module, seams, recorder)

            spec.loader.exec_module = execute_and_instrument  # type: ignore[method-assign]
        return spec
