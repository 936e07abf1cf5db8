"""The agent's process: a thin loop around :class:`AgentState`, a socket, and the processes of jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from downpour_common import exitcodes
from downpour_common.errors import DownpourError
from downpour_common.keys import ClientKeys
from downpour_common.messages import LogData, Message, RegisterNode
from downpour_common.transport.zeromq import ZmqClient
from downpour_common.wire import CONTROL_HEADER_LIMIT
from downpour_deploy.agent import spawn
from downpour_deploy.agent.announce import Announcer
from downpour_deploy.agent.effects import (
    AgentFacts,
    CancelFetch,
    Effect,
    Exit,
    Fetch,
    Numbers,
    ProcessId,
    ReadLog,
    Reconnect,
    RemoveFolder,
    Send,
    Signal,
    Spawn,
    Tell,
)
from downpour_deploy.agent.fetcher import Fetcher
from downpour_deploy.agent.folder import DataFolder
from downpour_deploy.agent.state import AgentState
from downpour_deploy.child import Child, end_all

PUMP_S = 0.02
"""Longest wait before the socket and the logs are looked at."""
REFUSED_S = 3.0
"""Time for which a key has to be refused before an agent that was never registered gives up."""


class AgentService:
    """Runs one agent to its end. Everything happens in the main thread, but for long work on files.

    That thread must also start the processes: they die with the *thread* that started them.
    """

    def __init__(
        self,
        facts: AgentFacts,
        host: spawn.Host,
        folder: DataFolder,
        keys: ClientKeys | None,
        announcer: Announcer,
        start_timeout_s: float,
    ) -> None:
        self._facts, self._host, self._folder, self._keys = facts, host, folder, keys
        self._announcer = announcer
        self._start_timeout_s = start_timeout_s
        self._client = self._connection()
        numbers = Numbers()
        self._started_s = time.monotonic()
        self._state = AgentState(facts, numbers, self._started_s)
        self._fetcher = Fetcher(folder, numbers, self._send, time.monotonic, facts.orphan_s)
        self._children: dict[ProcessId, Child] = {}
        self._fetching: dict[ProcessId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._refused_s: float | None = None
        self._exit: int | None = None

    def _connection(self) -> ZmqClient:
        return ZmqClient(CONTROL_HEADER_LIMIT, self._keys, watch=True)

    async def run(self) -> int:
        """Until it is asked to stop, or turned down; an exit code. No process of a job is left when it returns."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            while self._exit is None:
                self._pump()
                await asyncio.sleep(PUMP_S)
                if self._crash is not None:
                    raise self._crash
        finally:
            hurry = asyncio.Event()
            hurry.set()
            await end_all(list(self._children.values()), 0.0, hurry)
            for task in self._fetching.values():
                task.cancel()
            await self._fetcher.close()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._client.close()
        return self._exit

    # ------------------------------------------------------------ events

    def _on_signal(self) -> None:
        self._announcer.stopping(self._state.running, again=self._state.stopping > 0)
        self._carry_out(self._state.stop(time.monotonic()))

    def _pump(self) -> None:
        while messages := self._client.poll(0):
            for _, message in messages:
                self._fetcher.received(message)
                self._carry_out(self._state.received(message, time.monotonic()))
        for process, child in self._children.items():
            self._state.grew(process, child.log_bytes)
        self._fetcher.tick()
        now_s = time.monotonic()
        self._carry_out(self._state.tick(now_s))
        trouble = self._client.trouble(self._host.coordinator)
        self._announcer.update(self._state, trouble, now_s)
        if not self._state.link.known:
            self._check_start(trouble, now_s)

    def _check_start(self, trouble: str, now_s: float) -> None:
        """Whether it makes sense to go on trying."""
        if trouble not in ("refused", "wrong-server-key"):
            self._refused_s = None
        elif self._refused_s is None:
            self._refused_s = now_s
        elif now_s - self._refused_s >= REFUSED_S:
            self._announcer.refused(trouble)
            self._exit = exitcodes.REFUSED
        if self._start_timeout_s and now_s - self._started_s >= self._start_timeout_s:
            self._announcer.gave_up(now_s - self._started_s)
            self._exit = exitcodes.UNREACHABLE

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._crash = task.exception()

    # ------------------------------------------------------------ effects

    def _send(self, message: Message) -> None:
        if isinstance(message, RegisterNode):  # so that clocks can be compared
            message = replace(message, document={**message.document, "time_s": time.time()})
        self._client.send(self._host.coordinator, message)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect.message)
                case ReadLog():
                    self._send_log(effect)
                case Fetch():
                    self._fetching[effect.process] = self._background(self._fetch(effect))
                case CancelFetch():
                    if task := self._fetching.pop(effect.process, None):
                        task.cancel()
                case Spawn():
                    self._spawn(effect)
                case Signal():
                    self._signal(self._children[effect.process], effect.kill)
                case RemoveFolder():
                    self._background(self._fetcher.forget(effect.job))
                case Reconnect():
                    # Closing may wait a moment for what is queued. Nothing else uses that socket any more.
                    self._background(asyncio.to_thread(self._client.close))
                    self._client = self._connection()
                case Tell():
                    self._announcer.tell(effect.text)
                case Exit():
                    self._announcer.left(effect.reason)
                    self._exit = exitcodes.REFUSED if effect.reason else exitcodes.OK

    async def _fetch(self, order: Fetch) -> None:
        error = ""
        try:
            await self._fetcher.prepare(order.process, order.document)
        except DownpourError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"{problem.filename or self._folder.path}: {problem.strerror or problem}"
        self._fetching.pop(order.process, None)
        self._carry_out(self._state.fetched(order.process, error, time.monotonic()))

    def _spawn(self, order: Spawn) -> None:
        process = order.process
        try:
            folder = self._folder.job(process.job)
            command, environment = spawn.process(self._host, process, order.document, folder)
            log = self._folder.log(process)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(log)
            child = Child(
                process.role,
                process.index,
                command,
                environment,
                log,
                lambda _child, _line: None,
                lambda child: self._on_exit(process, child),
                epoch=process.epoch,
                cwd=self._folder.work(process.job) if process.role == "worker" else folder,
            )
        except DownpourError as problem:
            self._carry_out(self._state.not_started(process, str(problem), time.monotonic()))
        except OSError as problem:
            error = f"{problem.filename or self._folder.path}: {problem.strerror or problem}"
            self._carry_out(self._state.not_started(process, error, time.monotonic()))
        else:
            self._children[process] = child
            self._state.started(process, child.pid)

    @staticmethod
    def _signal(child: Child, kill: bool) -> None:
        if kill:
            child.send_signal(signal.SIGKILL)
        else:
            # Not what it started: a script that leaves in good order needs its data loaders until then.
            child.send_signal(signal.SIGTERM, alone=True)

    def _on_exit(self, process: ProcessId, child: Child) -> None:
        del self._children[process]
        code = child.returncode or 0
        self._carry_out(self._state.ended(process, code, tuple(child.tail), child.log_bytes, time.monotonic()))

    def _send_log(self, part: ReadLog) -> None:
        try:
            with open(self._folder.log(part.process), "rb") as file:
                data = os.pread(file.fileno(), part.length, part.offset)
        except OSError:
            data = b""
        if len(data) < part.length:  # somebody has removed or cut it
            self._state.unreadable(part.process)
            return
        facts = self._facts
        self._send(LogData(part.request, facts.node, facts.instance, *part.process.parts, part.offset, data))
