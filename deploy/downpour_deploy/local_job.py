"""A whole job on this machine: :class:`Lifecycle` decides; here its processes start and end, and messages move."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from downpour_common import exitcodes
from downpour_common.config import to_toml
from downpour_common.transport.zeromq import ZmqServer
from downpour_coordinator import checkpoints
from downpour_coordinator.effects import LogRow
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.outcome import Outcome, outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure, Process
from downpour_coordinator.service import JobService
from downpour_deploy import launch, running
from downpour_deploy.chaos import Chaos, Plan
from downpour_deploy.child import Child, end_all
from downpour_deploy.display import Display
from downpour_deploy.resolve import ResolvedJob

PUMP_S = 0.02
"""Longest wait before the coordinator's socket is looked at, should its descriptor have stayed silent."""
DRAW_S = 0.25


class LocalJob:
    """The processes of one job and the coordinator between them."""

    def __init__(self, job: ResolvedJob, display: Display, runtime: str, transport: ZmqServer, metrics: TextIO) -> None:
        self._spec = job.spec
        self._display = display
        self._runtime = runtime
        self._job_id = f"{job.spec.name}-{secrets.token_hex(8)}"
        self._children: dict[tuple[str, int], Child] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._signal = signal.SIGINT
        self._wake = asyncio.Event()
        self._transport = transport
        out = os.path.abspath(job.spec.out)
        self._threads = job.threads
        facts = launch.job_facts(job, self._job_id)
        newest = (checkpoints.numbers(job.spec.out) or [0])[-1]
        self._job = Lifecycle(self._job_id, job.spec, facts, out + "/", newest)
        self._working: set[asyncio.Future[Any]] = set()
        self._service = JobService(self._job, out, transport.send, metrics, later=self._later)
        plan = job.chaos or Plan()
        self._environment = {**os.environ, **plan.environment()}
        self._chaos = Chaos(plan, job.spec.seed, display.note, lambda row: self._service.carry_out([LogRow(row)]))

    async def run(self) -> Outcome:
        """Start, watch, finish; ends every process it started, on every path."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_reader(self._transport.fileno(), self._pump)
        try:
            with open(os.path.join(self._spec.out, "job.toml"), "w", encoding="utf-8") as file:
                # As one could submit it again: relative paths in a job file are below its own folder.
                file.write(to_toml(self._spec.model_copy(update={"script": os.path.abspath(self._spec.script)})))
            running.write(self._spec.out, self._job_id, self._transport.address)
            self._service.carry_out(self._job.begin(time.monotonic()))
            self._start_pending()
            await self._watch()
            await self._last_copy()
        except OSError as error:
            message = f"{error.filename or ''}: {error.strerror or error}"
            failure = Failure("run", -1, exitcodes.IO_ERROR, message, reason="RESULT_NOT_WRITTEN")
            self._job.failure = self._job.failure or failure
        finally:
            hurry = asyncio.Event()
            await end_all([c for c in self._children.values() if c.running], self._spec.settings.grace_s, hurry)
            for task in self._ending:
                task.cancel()
            if self._working:
                await asyncio.wait(self._working)
            running.remove(self._spec.out)
            loop.remove_reader(self._transport.fileno())
        return self._outcome()

    # ------------------------------------------------------------ processes

    def _start_pending(self) -> None:
        for process in sorted(self._job.pending(), key=lambda p: p.role, reverse=True):  # workers import for longer
            self._job.placed(process.role, process.index, "localhost", time.monotonic())
            self._spawn(process)

    def _spawn(self, process: Process) -> None:
        spec, address, index = self._job.spec, self._transport.address, process.index  # which may have changed
        threads = self._threads.workers if process.role == "worker" else self._threads.shards
        workers, environment = self._job.training.facts.workers, self._environment
        place = launch.Place(epoch=process.epoch, workers=workers, threads=threads, environment=environment)
        name = process.name.replace("/", "-") + (f".{process.epoch}" if process.epoch else "")
        if process.role == "worker":
            command, environment = launch.worker_process(spec, self._job_id, address, index, place)
        else:
            endpoint = launch.endpoint(spec, self._runtime, name)
            training = self._job.training
            term = training.shards[index % spec.shards].term
            place = replace(place, follows=training.follows(index), term=term)
            command, environment = launch.shard_process(spec, self._job_id, address, index, endpoint, place)
        log = os.path.join(spec.out, "logs", f"{name}.log")
        child = Child(process.role, index, command, environment, log, self._on_line, self._on_exit, epoch=process.epoch)
        child.name = process.name
        self._children[process.role, index] = child

    def _end_stopping(self) -> None:
        """SIGTERM, then SIGKILL after the grace in force by then, which a second Ctrl-C may have shortened."""
        for process in self._job.stopping():
            child = self._children[process.role, process.index]
            if child.running and not child.ending:
                child.ending = True
                child.send_signal(signal.SIGTERM)
                task = asyncio.create_task(self._end(child, process))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    async def _end(self, child: Child, process: Process) -> None:
        asked_s = time.monotonic()
        while child.running:
            if time.monotonic() - asked_s >= (process.stop or 0.0):
                child.send_signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.exited.wait(), PUMP_S)

    # ------------------------------------------------------------ while it runs

    async def _watch(self) -> None:
        drawn_s = 0.0
        while not self._job.over:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), PUMP_S)
            self._wake.clear()
            self._pump()
            now_s = time.monotonic()
            self._service.carry_out(self._job.tick(now_s))
            if self._job.phase is Phase.QUEUED:  # it is started again
                self._service.carry_out(self._job.begin(now_s))
            training = self._job.phase is Phase.TRAINING and self._job.training.begun
            parts = self._job.training.parts()
            self._chaos.turn(now_s, training, self._job.training.clock(), self._children, parts)
            self._end_stopping()
            self._start_pending()
            if now_s - drawn_s >= DRAW_S:
                drawn_s = now_s
                self._display.progress(self._job, now_s)

    async def _last_copy(self) -> None:
        """Wait for it while bytes move; a Ctrl-C after the job's end gives it up."""
        copies = self._service.copies
        if copies is None:
            return
        copies.end()
        problem = await asyncio.to_thread(copies.join)
        if problem:
            self._service.problems.append(f"{problem}; the newest checkpoint is in {self._spec.out} alone")

    def _pump(self) -> None:
        while arrived := self._transport.poll(0):
            for peer, message in arrived:
                if not self._service.take(peer, message):
                    self._transport.malformed += 1

    def _later(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Meanwhile workers are given their samples, and others join."""
        future = asyncio.get_running_loop().run_in_executor(None, work)
        self._working.add(future)

        def finished(result: asyncio.Future[Any]) -> None:
            self._working.discard(future)
            done(result.result())
            self._wake.set()

        future.add_done_callback(finished)

    def _on_line(self, child: Child, text: str) -> None:
        self._display.line(child.role, child.index, text, child.name)

    def _on_exit(self, child: Child) -> None:
        self._pump()
        code = child.returncode or 0
        ended = self._job.ended((child.role, child.index), child.epoch, code, time.monotonic(), tuple(child.tail))
        self._service.carry_out(ended)
        self._wake.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._service.copies is not None and (self._job.over or self._job.interrupted):
            self._service.copies.abandon()
        if not self._job.interrupted and not self._job.over:
            self._signal = number
            self._display.note("stopping; a second Ctrl-C ends everything at once")
        self._service.carry_out(self._job.stop("INTERRUPTED", keep=True, now_s=time.monotonic()))
        self._wake.set()

    def _outcome(self) -> Outcome:
        outcome = outcome_of(self._job, self._spec.out, time.monotonic())
        if outcome.state == "INTERRUPTED":
            outcome.exit_code = exitcodes.of_process(-self._signal)
        if outcome.state == "FAILED" and checkpoints.committed(self._spec.out):
            outcome.warnings.append(f"the last checkpoint is kept; go on from it with --resume {self._spec.out}")
        outcome.warnings.extend(self._service.problems)
        return outcome
