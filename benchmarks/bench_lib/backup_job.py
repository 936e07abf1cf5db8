"""A job of ``downpour run`` of which one worker is frozen for a while, and how long the others' steps take then."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_lib.contender import ContenderError
from bench_lib.local_job import SCRIPTS
from bench_lib.programs import Programs

LOOK_S = 0.05
PROOF = 5
"""Steps of each worker before anything is measured, and after it has gone on."""
SETTLE_S = 0.5
"""Time between freezing a worker and looking at the others."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Lengths of the others' steps in seconds: while all train, and while one is frozen."""

    normal_s: list[float]
    frozen_s: list[float]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.frozen_s) / statistics.median(self.normal_s)


class BackupJob:
    """``workers`` in a mode; the last of them is the one that freezes. Times are of CLOCK_MONOTONIC, in seconds."""

    def __init__(self, mode: str, workers: int, step_ms: float, timeout_s: float) -> None:
        self._name, self._workers, self._timeout_s = mode, workers, timeout_s
        self._step_ms = step_ms
        self._programs = Programs(mode)
        self._folder = Path(self._programs.folder)

    def start(self) -> None:
        """Start it, and wait until all train. Raises :class:`ContenderError`."""
        notes = self._folder / "notes"
        notes.mkdir()
        options = ["-w", str(self._workers), "--mode", self._name, "--threads", "1", "--set", "checkpoint_s=0"]
        run = ["-m", "downpour_deploy", "run", "-q", "--json", *options, "--out", str(self._folder / "run")]
        script = [str(SCRIPTS / "sleeping.py"), "--step-ms", str(self._step_ms), "--notes", str(notes)]
        self._programs.start([sys.executable, *run, *script, "--until", str(self._folder / "end")], {})
        self._await("steps of all workers", lambda: self._all_train(0.0))

    def undisturbed(self, window_s: float) -> list[float]:
        """Lengths of steps while all train for so long. Raises :class:`ContenderError`."""
        begun_s = time.monotonic()
        self._pass(window_s)
        return self._steps(begun_s, time.monotonic())

    def turn(self, window_s: float) -> Turn:
        """Train undisturbed, then with one frozen, each for so long. Raises :class:`ContenderError`."""
        normal_s = self.undisturbed(window_s)
        victim = self._notes()[self._workers - 1].pid
        os.kill(victim, signal.SIGSTOP)
        try:
            self._pass(SETTLE_S)
            begun_s = time.monotonic()
            self._pass(window_s)
            frozen_s = self._steps(begun_s, time.monotonic())
        finally:
            os.kill(victim, signal.SIGCONT)
        gone_on_s = time.monotonic()
        self._await("steps of the one that was frozen", lambda: self._all_train(gone_on_s))
        if not normal_s or not frozen_s:
            raise ContenderError(f"{self._name}: no step within {window_s:g} s")
        return Turn(normal_s, frozen_s)

    def end(self) -> dict[str, Any]:
        """Let it come to its end; what it says then. Raises :class:`ContenderError`."""
        (self._folder / "end").touch()
        self._programs.await_end()
        (line,) = [line for line in self._programs.output(0).splitlines() if line.startswith('{"job":')]
        document: dict[str, Any] = json.loads(line)
        return document

    def close(self) -> None:
        """End it in any case."""
        self._programs.close()

    # ------------------------------------------------------------ what there is

    def _pass(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        self._await("time", lambda: time.monotonic() >= until_s)

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        while not there():
            self._programs.check()
            if time.monotonic() > deadline_s:
                raise ContenderError(f"{self._name}: no {what} within {self._timeout_s:g} s")
            time.sleep(LOOK_S)

    def _notes(self) -> dict[int, _Notes]:
        found = {}
        for path in (self._folder / "notes").iterdir():
            slot, _, pid = path.name.partition("-")
            data = path.read_bytes()
            found[int(slot)] = _Notes(int(pid), array("d", data[: len(data) // 8 * 8])[1:])
        return found

    def _all_train(self, after_s: float) -> bool:
        """Whether each worker has done :data:`PROOF` steps after that."""
        notes = self._notes()
        done = [sum(1 for at in each.steps_s if at > after_s) >= PROOF for each in notes.values()]
        return len(done) == self._workers and all(done)

    def _steps(self, begun_s: float, ended_s: float) -> list[float]:
        """Lengths of the steps that the others began and ended in this time."""
        lengths: list[float] = []
        for slot, each in self._notes().items():
            if slot != self._workers - 1:
                times: Sequence[float] = [at for at in each.steps_s if begun_s <= at <= ended_s]
                lengths += [after - before for before, after in pairwise(times)]
        return lengths


@dataclass(frozen=True, slots=True)
class _Notes:
    pid: int
    steps_s: array[float]
