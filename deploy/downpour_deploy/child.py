"""A process of the job on this machine: started, watched through its pidfd, its output forwarded, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from downpour_common.process import die_with_parent, prepare_child

TAIL_LINES = 60
"""Last lines of output kept for the report of a failure."""
LINE_BYTES = 1 << 20
"""Output without an end of line (progress bars have none) counts as a line from here on."""


class Child:
    """One process, in a session of its own, so that Ctrl-C reaches only the launcher.

    ``on_line(child, text)`` gets each line of its output, ``on_exit(child)`` is called once, after the last of them.
    The process dies with the launcher, whatever kills that.
    """

    def __init__(
        self,
        role: str,
        index: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: str,
        on_line: Callable[[Child, str], None],
        on_exit: Callable[[Child], None],
        epoch: int = 0,
        cwd: str | None = None,
    ) -> None:
        self.role, self.index, self.epoch = role, index, epoch
        self.name = f"{role}/{index}"
        """for people"""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.returncode: int | None = None
        self.ending = False
        """whether it has been told to end"""
        self.log_bytes = 0
        """bytes of its output that are in the log file"""
        self._on_line, self._on_exit = on_line, on_exit
        self._loop = asyncio.get_running_loop()
        self._log: BinaryIO | None = open(log, "ab")  # noqa: SIM115
        self._partial = b""
        self.exited = asyncio.Event()
        prepare_child()
        try:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it allocates nothing and takes no lock
            )
        except OSError:
            self._close_log()
            raise
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._output, self._read)
        self._loop.add_reader(self._pidfd, self._ended)

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.returncode is None

    def send_signal(self, number: signal.Signals, alone: bool = False) -> None:
        """Signal the process and whatever it started in its session; ``alone``: only the process."""
        if self.running:
            try:
                (os.kill if alone else os.killpg)(self.pid, number)
            except ProcessLookupError:
                pass  # it ended this instant; the pidfd tells

    def _read(self) -> None:
        try:
            data = os.read(self._output, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._output)
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        if self._log is not None:
            try:
                self._log.write(data)
                self._log.flush()
                self.log_bytes += len(data)
            except OSError as error:
                self._on_line(self, f"[from here on, the log file is not written: {error.strerror}]")
                self._close_log()
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) >= LINE_BYTES:
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._emit(line)

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self.tail.append(text)
        self._on_line(self, text)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.returncode = self._process.wait()
        self._drain()
        try:
            os.killpg(self.pid, signal.SIGKILL)  # what the process left running in its session
        except (ProcessLookupError, PermissionError):
            pass  # nothing was left
        self.exited.set()
        self._on_exit(self)

    def _drain(self) -> None:
        self._loop.remove_reader(self._output)
        try:
            while data := os.read(self._output, 1 << 16):
                self._take(data)
        except BlockingIOError:
            pass  # a process it started still holds the pipe; it is being ended
        if self._partial:
            self._emit(self._partial)
            self._partial = b""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take has been told
                log.close()


async def end_all(children: Sequence[Child], grace_s: float, hurry: asyncio.Event) -> None:
    """End every process: SIGTERM, ``grace_s`` seconds or until ``hurry``, SIGKILL. Returns when all have ended."""
    for child in children:
        child.send_signal(signal.SIGTERM)
    ended = asyncio.ensure_future(_all_ended(children))
    hurried = asyncio.ensure_future(_set(hurry))
    await asyncio.wait([ended, hurried], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    for child in children:
        child.send_signal(signal.SIGKILL)
    await ended


async def _all_ended(children: Sequence[Child]) -> None:
    for child in children:
        await child.exited.wait()


async def _set(event: asyncio.Event) -> None:
    await event.wait()
