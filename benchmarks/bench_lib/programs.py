"""Programs that a contender starts as a user would, with their output kept for when they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench_lib.contender import ContenderError
from downpour_common.process import die_with_parent, prepare_child

END_GRACE_S = 30.0  # a job writes its model when it ends
TERM_GRACE_S = 10.0
TAIL_CHARACTERS = 3000
NOT_INHERITED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # the defaults are to count


class Programs:
    """Some programs and a folder for what they write; both are gone after :meth:`close`."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._folder = tempfile.TemporaryDirectory(prefix="downpour-bench-")
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def folder(self) -> str:
        """For files of the programs."""
        return self._folder.name

    @property
    def pids(self) -> list[int]:
        """Of the programs, not of what they started."""
        return [process.pid for process in self._running]

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start one; it dies with this process, whatever kills that."""
        inherited = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        prepare_child()
        with open(self._log(len(self._running)), "wb") as log:
            process = subprocess.Popen(
                command,
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it allocates nothing and takes no lock
            )
        self._running.append(process)

    def output(self, index: int) -> str:
        """What the program that was started as number ``index`` has written so far."""
        return self._log(index).read_text(errors="replace")

    def check(self) -> None:
        """Raises :class:`ContenderError` with the end of its output when a program has ended."""
        for index, process in enumerate(self._running):
            if process.poll() is not None:
                text = self.output(index)[-TAIL_CHARACTERS:]
                raise ContenderError(f"{self._owner}: ended with exit code {process.returncode}:\n{text}")

    def await_end(self) -> None:
        """Wait for programs that have been told to end. Raises :class:`ContenderError` when one does not, or badly."""
        deadline_s = time.monotonic() + END_GRACE_S
        for process in self._running:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise ContenderError(f"{self._owner}: did not end within {END_GRACE_S:g} s") from None
        if any(process.returncode for process in self._running):
            self.check()

    def close(self) -> None:
        """End what still runs: terminated, then killed."""
        for number, grace_s in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, TERM_GRACE_S)):
            alive = [process for process in self._running if process.poll() is None]
            for process in alive:
                os.killpg(process.pid, number)
            deadline_s = time.monotonic() + grace_s
            for process in alive:
                try:
                    process.wait(max(0.0, deadline_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pass
        self._running.clear()
        self._folder.cleanup()

    def _log(self, index: int) -> Path:
        return Path(self.folder) / f"output-{index}.log"
