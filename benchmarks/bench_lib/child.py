"""The child's side of a crew: sets the process up, then runs one worker whenever the parent says so."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection

RUN, STOP = "run", "stop"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Tell = Callable[[str], None]  # sends the parent a word during set-up, such as the port that was bound
RunOnce = Callable[[], float]  # one run, in seconds by this process's clock
Worker = Callable[..., AbstractContextManager[RunOnce]]  # worker(tell, *arguments); leaving it tears down


@dataclass(frozen=True)
class Hello:
    """What the worker told during its set-up."""

    text: str


@dataclass(frozen=True)
class Ready:
    """Set-up is finished; runs may be asked for."""


@dataclass(frozen=True)
class Took:
    """One run is finished."""

    seconds: float


@dataclass(frozen=True)
class Failed:
    """The worker raised; the child ends."""

    trace: str


Report = Hello | Ready | Took | Failed


def main(connection: Connection, parent_pid: int, worker: Worker, arguments: tuple[object, ...]) -> None:
    """Entry point of a spawned child."""
    die_with(parent_pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the crew blocks it while it spawns
    try:
        with worker(lambda text: connection.send(Hello(text)), *arguments) as run_once:
            connection.send(Ready())
            while next_command(connection) == RUN:
                connection.send(Took(run_once()))
    except Exception:
        connection.send(Failed(traceback.format_exc()))


def next_command(connection: Connection) -> str:
    """The parent's next word; STOP if the parent has closed the pipe."""
    try:
        command: str = connection.recv()
    except EOFError:
        return STOP
    return command


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens, even while stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
