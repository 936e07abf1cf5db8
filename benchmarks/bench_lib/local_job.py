"""A job that is started with ``downpour run``, so that the launcher, the coordinator and all defaults count."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_lib.contender import ContenderError
from bench_lib.gate import VARIABLE, Gate, GoneError, TurnTaken
from bench_lib.programs import Programs

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


class GatedPrograms:
    """Programs whose ``count`` training processes meet at a gate."""

    def __init__(self, name: str, count: int, timeout_s: float) -> None:
        self._programs = Programs(name)
        self._fit = False  # to come to its end by itself
        self.gate = Gate(self._programs.folder, count, timeout_s, self._programs.check)

    @property
    def folder(self) -> str:
        """For files of the programs."""
        return self._programs.folder

    @property
    def pids(self) -> list[int]:
        """Of the programs that were started, the launcher's where there is one."""
        return self._programs.pids

    def add(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Start Python with these arguments."""
        self._programs.start([sys.executable, *arguments], {VARIABLE: self.gate.path, **(environment or {})})

    def add_job(self, options: Sequence[str], script: Sequence[str]) -> None:
        """Start ``downpour run`` with these options. No checkpoints: nothing that it is compared with writes any."""
        out = os.path.join(self.folder, "run")
        self.add(["-m", "downpour_deploy", "run", "-q", *options, "--out", out, "--set", "checkpoint_s=0", *script])

    def await_ready(self) -> None:
        """Wait until all are at the gate. Raises :class:`ContenderError`."""
        self.gate.admit()
        self._fit = True

    def turn(self, warm: int, steps: int, task: str = "") -> TurnTaken:
        """See :meth:`Gate.turn`."""
        self._fit = False
        try:
            taken = self.gate.turn(warm, steps, task)
        except GoneError:
            self._programs.await_end()  # with its own words, where it has any
            raise
        self._fit = True
        return taken

    def close(self) -> None:
        """End the scripts and with them the jobs. Raises :class:`ContenderError` when one ends badly."""
        self.gate.close()
        try:
            if self._fit:
                self._fit = False
                self._programs.await_end()
        finally:
            self._programs.close()


class PushPullJob:
    """One worker that pushes and pulls ``megabytes`` in every step; ``options`` are those of ``downpour run``."""

    def __init__(self, name: str, megabytes: int, timeout_s: float, options: Sequence[str]) -> None:
        self.name = name
        self._megabytes = megabytes
        self._options = options
        self.programs = GatedPrograms(name, 1, timeout_s)

    def start(self) -> None:
        """Start the job. Raises :class:`ContenderError`."""
        script = [str(SCRIPTS / "push.py"), "--mb", str(self._megabytes)]
        self.programs.add_job(["-w", "1", *self._options], script)
        self.programs.await_ready()

    def run_once(self) -> float:
        """One ``optimizer.step()``, in seconds."""
        return self.programs.turn(0, 1, "step").seconds

    def close(self) -> None:
        """End the job."""
        try:
            self.programs.close()
        except ContenderError as error:
            raise ContenderError(f"{self.name} did not end well: {error}") from error
