"""The parent's side of a contender's processes: spawn, ask for runs, end. Every wait here is bounded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

from bench_lib import child
from bench_lib.contender import ContenderError

STOP_GRACE_S = 5.0  # to leave by itself: long enough for a peer library's own shutdown
TERM_GRACE_S = 2.0

T = TypeVar("T", child.Hello, child.Ready, child.Took)


class Crew:
    """The processes of one contender, by role, each with a control pipe.

    With `park_when_idle` they are stopped (SIGSTOP) between runs, for libraries that poll without sleeping.
    """

    def __init__(self, owner: str, timeout_s: float, *, park_when_idle: bool = False) -> None:
        self._owner = owner
        self._timeout_s = timeout_s
        self._park_when_idle = park_when_idle
        self._processes: dict[str, SpawnProcess] = {}
        self._pipes: dict[str, Connection] = {}

    def spawn(self, role: str, worker: child.Worker, *arguments: object) -> None:
        """Start one child; it sets itself up while the caller goes on. `worker` is a module's function."""
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # else the first start() does it, and that unblocks SIGINT
        ours, theirs = context.Pipe()
        self._pipes[role] = ours
        try:
            process = context.Process(
                target=child.main,
                args=(theirs, os.getpid(), worker, arguments),
                name=f"{self._owner}:{role}",
                daemon=True,
            )
            with _signals_held():  # so that no child exists that close() does not know
                process.start()
                self._processes[role] = process
        finally:
            theirs.close()  # ours then sees end-of-file when the child ends

    def hear(self, role: str) -> str:
        """What the child in `role` told during its set-up."""
        return self._collect(child.Hello, [role])[role].text

    def await_ready(self) -> None:
        """Wait until every child has finished its set-up."""
        self._collect(child.Ready, list(self._pipes))
        self._park()

    def run_once(self) -> dict[str, float]:
        """Have all children run once, together; the seconds that each measured, by role."""
        self._signal_all(signal.SIGCONT)
        for role, pipe in self._pipes.items():
            try:
                pipe.send(child.RUN)
            except OSError as error:
                raise ContenderError(f"{self._owner}: {role} is gone: {error}") from error
        took = self._collect(child.Took, list(self._pipes))
        self._park()
        return {role: report.seconds for role, report in took.items()}

    def close(self) -> None:
        """End and join all children: asked first, then terminated, then killed."""
        self._signal_all(signal.SIGCONT)
        for pipe in self._pipes.values():
            with suppress(OSError):  # it has ended already
                pipe.send(child.STOP)
        for end, grace_s in ((None, STOP_GRACE_S), ("terminate", TERM_GRACE_S), ("kill", TERM_GRACE_S)):
            alive = [process for process in self._processes.values() if process.is_alive()]
            if end is not None:
                for process in alive:
                    getattr(process, end)()
            deadline_s = time.monotonic() + grace_s
            for process in alive:
                process.join(max(0.0, deadline_s - time.monotonic()))
        for process in self._processes.values():
            process.close()
        for pipe in self._pipes.values():
            pipe.close()
        self._processes.clear()
        self._pipes.clear()

    def _collect(self, kind: type[T], roles: list[str]) -> dict[str, T]:
        """One report of this kind from each role; fails as soon as any of them fails."""
        deadline_s = time.monotonic() + self._timeout_s
        waiting = {self._pipes[role]: role for role in roles}
        reports: dict[str, T] = {}
        while waiting:
            readable = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
            if not readable:
                late = ", ".join(waiting.values())
                raise ContenderError(f"{self._owner}: no answer from {late} within {self._timeout_s:.0f} s")
            for pipe in readable:
                assert isinstance(pipe, Connection)
                role = waiting.pop(pipe)
                report = self._receive(role, pipe)
                if not isinstance(report, kind):
                    raise ContenderError(f"{self._owner}: {role} sent {report}, expected {kind.__name__}")
                reports[role] = report
        return reports

    def _receive(self, role: str, pipe: Connection) -> child.Report:
        try:
            report: child.Report = pipe.recv()
        except (EOFError, OSError) as error:
            process = self._processes[role]
            process.join(TERM_GRACE_S)
            raise ContenderError(f"{self._owner}: {role} ended with exit code {process.exitcode}") from error
        if isinstance(report, child.Failed):
            raise ContenderError(f"{self._owner}: {role} failed:\n{report.trace}")
        return report

    def _park(self) -> None:
        if self._park_when_idle:
            self._signal_all(signal.SIGSTOP)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.is_alive() and process.pid is not None:  # not yet reaped, so the id is still its own
                os.kill(process.pid, number)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back; they are delivered afterwards.

    A child started inside inherits this, and keeps it for SIGINT: a Ctrl-C at the terminal reaches the whole
    foreground group, and it is the parent's to act on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
