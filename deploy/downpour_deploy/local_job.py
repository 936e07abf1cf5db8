"""A whole job on this machine: its processes and the coordinator between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import time
from typing import TextIO

from downpour_common import exitcodes
from downpour_common.config import to_toml
from downpour_common.errors import CheckpointError
from downpour_common.transport.zeromq import ZmqServer
from downpour_coordinator import checkpoints
from downpour_coordinator.export import export_model
from downpour_coordinator.service import CoordinatorService
from downpour_coordinator.state import Coordinator
from downpour_deploy import launch
from downpour_deploy.child import Child, end_all
from downpour_deploy.display import Display
from downpour_deploy.outcome import Failure, Outcome, State, fill_figures
from downpour_deploy.resolve import ResolvedJob

PUMP_S = 0.02
"""Longest wait before the coordinator's socket is looked at, should its descriptor have stayed silent."""
DRAW_S = 0.25
RETRY_S = 5.0
"""Time before a checkpoint that failed is tried again."""
STOP_SNAPSHOT_S = 10.0
"""Time that an interrupted job is given for its last checkpoint."""
SHARD_GRACE_S = 5.0


class LocalJob:
    """The processes of one job and the coordinator between them."""

    def __init__(self, job: ResolvedJob, display: Display, runtime: str, transport: ZmqServer, metrics: TextIO) -> None:
        self._spec = job.spec
        self._display = display
        self._runtime = runtime
        self._job_id = f"{job.spec.name}-{secrets.token_hex(8)}"
        self._started_s = time.monotonic()
        self._first_step_s: float | None = None
        self._trained_s: float | None = None
        self._children: list[Child] = []
        self._failure: Failure | None = None
        self._interrupted = 0
        self._signal = signal.SIGINT
        self._hurry = asyncio.Event()
        self._degraded = ""
        self._warnings: list[str] = []
        self._snapshots = (checkpoints.numbers(job.spec.out) or [0])[-1]
        self._snapshot_s = time.monotonic()
        self._committed: dict[int, asyncio.Future[str]] = {}
        self._over = asyncio.Event()
        self._stopping = False
        self._transport = transport
        self._service = CoordinatorService(
            Coordinator(launch.job_facts(job, self._job_id)), self._transport, metrics, self._on_snapshot
        )

    @property
    def _state(self) -> Coordinator:
        return self._service.state

    async def run(self) -> Outcome:
        """Start, watch, finish; ends every process it started, on every path."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_reader(self._transport.fileno(), self._service.pump)
        model: str | None = None
        try:
            with open(os.path.join(self._spec.out, "job.toml"), "w", encoding="utf-8") as file:
                file.write(to_toml(self._spec))
            self._start()
            await self._watch()
            model = await self._close()
        except OSError as error:
            self._fail(Failure("run", -1, exitcodes.IO_ERROR, f"{error.filename or ''}: {error.strerror or error}"))
        finally:
            self._stopping = True
            await end_all(self._children, self._spec.settings.grace_s, self._hurry)
            loop.remove_reader(self._transport.fileno())
        return self._outcome(model)

    # ------------------------------------------------------------ starting

    def _start(self) -> None:
        spec, address = self._spec, self._transport.address
        for slot in range(spec.workers):
            self._spawn("worker", slot, *launch.worker_process(spec, self._job_id, address, slot))
        for index in range(spec.shards):
            endpoint = launch.endpoint(spec, self._runtime, f"server-{index}")
            self._spawn("server", index, *launch.shard_process(spec, self._job_id, address, index, endpoint))

    def _spawn(self, role: str, index: int, command: list[str], environment: dict[str, str]) -> None:
        log = os.path.join(self._spec.out, "logs", f"{role}-{index}.log")
        self._children.append(Child(role, index, command, environment, log, self._on_line, self._on_exit))

    # ------------------------------------------------------------ while it runs

    async def _watch(self) -> None:
        """Until all workers have ended, something failed, or the user wants it to end."""
        settings = self._spec.settings
        drawn_s = 0.0
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), PUMP_S)
            self._service.pump()
            now_s = time.monotonic()
            waited_s = now_s - self._started_s
            if self._state.training:
                if self._first_step_s is None:
                    self._first_step_s = self._snapshot_s = now_s
                if settings.checkpoint_s and now_s - self._snapshot_s >= settings.checkpoint_s:
                    self._begin_snapshot()
            elif waited_s > settings.start_timeout_s:
                names = ", ".join(self._state.waiting_for()) or "the servers to take the model"
                self._fail(Failure("run", -1, exitcodes.FAILED, f"after {waited_s:.0f} s still waiting for {names}"))
            if now_s - drawn_s >= DRAW_S:
                drawn_s = now_s
                self._display.progress(self._state, waited_s, self._degraded)

    def _on_line(self, child: Child, text: str) -> None:
        self._display.line(child.role, child.index, text)

    def _on_exit(self, child: Child) -> None:
        self._service.pump()
        if self._stopping or self._failure is not None:
            return
        code = child.returncode or 0
        if child.role == "worker" and code == 0 and self._state.workers[child.index].gone:
            if all(not c.running for c in self._children if c.role == "worker"):
                self._trained_s = time.monotonic()
                self._over.set()
            return
        self._fail(self._explain(child, code))

    def _explain(self, child: Child, code: int) -> Failure:
        reported = next((f for f in self._state.failures if f.slot == child.index), None)
        if code < 0:
            message = f"killed by signal {-code} ({_signal_name(-code)})"
            return Failure(child.role, child.index, exitcodes.of_process(code), message, "\n".join(child.tail))
        if child.role == "worker" and reported is not None:
            return Failure(child.role, child.index, code or 1, reported.error, reported.traceback.rstrip())
        if code == 0 and child.role == "worker" and not self._state.workers[child.index].pid:
            message = f"{self._spec.script} ended without calling downpour.prepare(), so nothing was trained"
            return Failure(child.role, child.index, exitcodes.FAILED, message)
        if code == 0:
            message = "ended with exit code 0 without leaving the job in good order (os._exit?)"
            return Failure(child.role, child.index, exitcodes.FAILED, message)
        return Failure(child.role, child.index, code, f"exit code {code}", "\n".join(child.tail))

    def _fail(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure
        self._over.set()

    def _on_signal(self, number: signal.Signals) -> None:
        self._interrupted += 1
        self._over.set()
        if self._interrupted > 1:
            self._hurry.set()
        else:
            self._signal = number
            self._display.note("stopping; a second Ctrl-C ends everything at once")
            self._service.carry_out(self._state.ask_to_stop("interrupted"))

    # ------------------------------------------------------------ checkpoints

    def _begin_snapshot(self, final: bool = False) -> asyncio.Future[str] | None:
        self._snapshot_s = time.monotonic()
        number = self._snapshots + 1
        folder = os.path.abspath(checkpoints.folder_of(self._spec.out, number))
        effects = self._state.begin_snapshot(number, folder, final)
        if not effects:
            return None
        self._snapshots = number
        self._committed[number] = asyncio.get_running_loop().create_future()
        self._service.carry_out(effects)
        return self._committed[number]

    def _on_snapshot(self, number: int, error: str) -> None:
        self._degraded = f"checkpoint {number}: {error}" if error else ""
        if error:
            self._snapshot_s += RETRY_S - self._spec.settings.checkpoint_s  # sooner than usual
            shutil.rmtree(checkpoints.folder_of(self._spec.out, number), ignore_errors=True)
        else:
            checkpoints.prune(self._spec.out, self._spec.settings.keep_checkpoints)
        future = self._committed.get(number)
        if future is not None and not future.done():
            future.set_result(error)

    def _training(self) -> bool:
        return any(c.running for c in self._children if c.role == "worker")

    async def _pump_until(self, future: asyncio.Future[str], timeout_s: float, for_workers: bool = False) -> str:
        """The future's result, or why it did not come; ``for_workers``: it cannot come without running workers."""
        deadline_s = time.monotonic() + timeout_s
        while not future.done():
            if time.monotonic() > deadline_s:
                return f"the shards did not answer within {timeout_s:g} s"
            if self._hurry.is_set():
                return "there was no time for it"
            if for_workers and not self._training():
                return "the workers have ended"
            if any(not c.running for c in self._children if c.role == "server"):
                return "a shard is gone"
            self._service.pump()
            await asyncio.wait([future], timeout=PUMP_S)
        return future.result()

    # ------------------------------------------------------------ ending

    async def _close(self) -> str | None:
        """The last checkpoint and the model, if there is something to keep; then let the shards go."""
        model = None
        if self._failure is None:
            if self._interrupted:
                model = await self._keep_interrupted()
            else:
                model = await self._export()
        self._stopping = True
        workers = [c for c in self._children if c.role == "worker"]
        await end_all(workers, self._spec.settings.grace_s, self._hurry)
        self._service.carry_out(self._state.stop_shards())
        registered = {s.pid for s in self._state.shards.values() if s.ready}
        shards = [asyncio.ensure_future(c.exited.wait()) for c in self._children if c.running and c.pid in registered]
        if shards and self._failure is None and not self._hurry.is_set():
            await asyncio.wait(shards, timeout=SHARD_GRACE_S)
            self._service.pump()
        return model

    async def _keep_interrupted(self) -> str | None:
        """A checkpoint of where an interrupted job is: while its workers still run, or of what they left."""
        settings = self._spec.settings
        error = "training had not begun"
        deadline_s = time.monotonic() + STOP_SNAPSHOT_S
        while error and time.monotonic() < deadline_s and (future := self._begin_snapshot()) is not None:
            error = await self._pump_until(future, max(0.1, deadline_s - time.monotonic()), for_workers=True)
            if not self._training():
                break
        if error and all(c.returncode == 0 for c in self._children if c.role == "worker"):
            self._warnings.append("interrupted, but every script had ended well by then")
            return await self._export()
        if error and self._state.training and self._interrupted == 1:
            self._stopping = True
            await end_all([c for c in self._children if c.role == "worker"], settings.grace_s, self._hurry)
            future = self._begin_snapshot(final=True)
            error = await self._pump_until(future, STOP_SNAPSHOT_S) if future is not None else error
        if error:
            self._warnings.append(f"no checkpoint was made at the interruption: {error}")
        else:
            self._warnings.append(f"interrupted; go on with --resume {self._spec.out}")
        return None

    async def _export(self) -> str | None:
        future = self._begin_snapshot(final=True)
        if future is None:
            return None
        error = await self._pump_until(future, self._spec.settings.timeout_s)
        path = os.path.join(self._spec.out, "model.safetensors")
        folder = checkpoints.folder_of(self._spec.out, self._snapshots)
        if not error:
            try:
                export_model(checkpoints.load(folder), path)
            except CheckpointError as problem:
                error = f"{problem}. The weights are safe in {folder}; make room and run again with --resume"
        if error:
            message = f"training ended well, but its result could not be written: {error}"
            self._fail(Failure("run", -1, exitcodes.IO_ERROR, message))
            return None
        return path

    def _outcome(self, model: str | None) -> Outcome:
        now_s = time.monotonic()
        state: State = "FAILED" if self._failure else "INTERRUPTED" if self._interrupted else "SUCCEEDED"
        code = exitcodes.OK
        if self._failure is not None:
            code = self._failure.exit_code or exitcodes.FAILED
        elif self._interrupted:
            code = exitcodes.of_process(-self._signal)
        if self._failure is not None and checkpoints.committed(self._spec.out):
            self._warnings.append(f"the last checkpoint is kept; go on from it with --resume {self._spec.out}")
        first_s = self._first_step_s
        outcome = Outcome(
            job=self._spec.name,
            state=state,
            exit_code=code,
            out=self._spec.out,
            model=model,
            wall_s=now_s - self._started_s,
            train_s=(self._trained_s or now_s) - first_s if first_s is not None else 0.0,
            start_s=first_s - self._started_s if first_s is not None else None,
            failure=self._failure,
            warnings=[*self._warnings, *self._service.problems],
        )
        fill_figures(outcome, self._state)
        return outcome


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"
