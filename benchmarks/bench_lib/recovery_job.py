"""A job of ``downpour run`` in which processes are killed, and what its workers have noted meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_lib.contender import ContenderError
from bench_lib.idle import PROC, STARTED, descendants
from bench_lib.local_job import SCRIPTS
from bench_lib.programs import Programs
from bench_lib.recovery import WORKERS, Case, Recovery, Trace, evaluate, lengths, steps_of

LOOK_S = 0.05
PROOF = 5
"""Steps of each worker after which it has recovered."""
TAIL_S = 0.5
"""How long it is watched after that."""
BYTES = 8


@dataclass(frozen=True)
class Noted:
    """The little of a trace that is looked at while all runs."""

    pid: int = 0
    joined_s: float = 0.0
    proof_s: float = 0.0
    """when the first of the last :data:`PROOF` steps was done; 0.0 without as many"""


class RecoveryJob:
    """One job of ``case``. Times are of CLOCK_MONOTONIC, in seconds."""

    def __init__(self, case: Case, timeout_s: float) -> None:
        self._case, self._timeout_s = case, timeout_s
        self._programs = Programs(case.name)
        self._folder = Path(self._programs.folder)
        self._since_s = 0.0
        self._turn = 0

    def start(self) -> None:
        """Start it, and wait until all train and there is a checkpoint. Raises :class:`ContenderError`."""
        notes = self._folder / "notes"
        notes.mkdir()
        run = ["-m", "downpour_deploy", "run", "-q", "--json", *self._case.options, "--out", str(self._folder / "run")]
        script = [str(SCRIPTS / "steps.py"), "--model", self._case.model, "--optimizer", "adam"]
        script += ["--notes", str(notes), "--until", str(self._folder / "end")]
        self._programs.start([sys.executable, *run, *script], {})
        self._await("steps of all workers", self._train)
        self._await("a checkpoint", lambda: self._committed_s() > 0)
        self._since_s = time.monotonic()

    def kill(self) -> Recovery:
        """Train undisturbed for a while, kill, and watch until all is as it was. Raises :class:`ContenderError`."""
        until_s = time.monotonic() + self._case.settle_s
        self._await("time", lambda: time.monotonic() >= until_s)
        commit_s = self._committed_s()
        slot = self._turn % WORKERS if self._case.victim == "worker" else None  # the other one is old enough by then
        self._turn += 1
        victim = self._servers()[0] if slot is None else self._newest()[slot].pid
        known = self._processes()
        kill_s = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        self._await("another process", lambda: bool(self._processes() - known))
        replaced_s = time.monotonic()
        joined_after_s = kill_s if self._case.begins_again or slot is not None else 0.0
        self._await("steps", lambda: self._train(replaced_s, slot, joined_after_s))
        time.sleep(TAIL_S)
        try:
            found = evaluate(self._traces(), kill_s, slot, self._since_s, commit_s)
        except ValueError as error:
            raise ContenderError(f"{self._case.name}: {error}") from error
        self._since_s = time.monotonic()
        return found

    def control(self) -> list[float]:
        """How long a worker's steps take while the other one is stopped and a process starts that is not of the job.

        That is what starting a process costs the others, by itself. Raises :class:`ContenderError`.
        """
        slot = self._turn % WORKERS
        stopped = self._newest()[slot].pid
        os.kill(stopped, signal.SIGSTOP)
        try:
            begun_s = time.monotonic()
            command = [sys.executable, "-u", "-c", "import torch, downpour"]
            subprocess.run(command, check=True, timeout=self._timeout_s, start_new_session=True)
            ended_s = time.monotonic()
        except subprocess.SubprocessError as error:
            raise ContenderError(f"{self._case.name}: the process for comparison: {error}") from error
        finally:
            os.kill(stopped, signal.SIGCONT)
        self._await("steps", lambda: self._train(ended_s))
        self._since_s = time.monotonic()
        return lengths(steps_of(self._traces(), 1 - slot), begun_s, ended_s)

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

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        while not there():
            self._programs.check()
            if time.monotonic() > deadline_s:
                raise ContenderError(f"{self._case.name}: no {what} within {self._timeout_s:g} s")
            time.sleep(LOOK_S)

    def _traces(self) -> list[Trace]:
        """Of all worker processes that have joined, the first first."""
        found = []
        for path in (self._folder / "notes").iterdir():
            slot, _, pid = path.name.partition("-")
            if times := _times(path, 0):
                found.append(Trace(int(slot), int(pid), times[0], list(times[1:])))
        return sorted(found, key=lambda trace: trace.joined_s)

    def _newest(self) -> dict[int, Noted]:
        """By slot: the worker process that joined last. Reads little, so that it can be called often."""
        found: dict[int, Noted] = {}
        for path in (self._folder / "notes").iterdir():
            slot, _, pid = path.name.partition("-")
            first, last = _times(path, 0, 1), _times(path, -PROOF - 1)
            noted = Noted(int(pid), first[0] if first else 0.0, last[1] if len(last) > PROOF else 0.0)
            if noted.joined_s > found.get(int(slot), Noted()).joined_s:
                found[int(slot)] = noted
        return found

    def _train(self, after_s: float = 0.0, slot: int | None = None, joined_after_s: float = 0.0) -> bool:
        """Whether each worker has done :data:`PROOF` steps after that, the one in ``slot`` (None: all of them) as a
        process that joined late enough."""
        newest = self._newest()
        late = [noted.joined_s > joined_after_s for each, noted in newest.items() if slot in (None, each)]
        return len(newest) == WORKERS and all(late) and all(noted.proof_s > after_s for noted in newest.values())

    def _processes(self) -> set[int]:
        return set(descendants(self._programs.pids[0]))

    def _servers(self) -> list[int]:
        """Process ids, the oldest first: of a leader and its backup, the leader."""
        found = []
        for pid, fields in descendants(self._programs.pids[0]).items():
            with contextlib.suppress(OSError):
                if b"downpour_server" in (PROC / str(pid) / "cmdline").read_bytes():
                    found.append((int(fields[STARTED]), pid))
        if not found:
            raise ContenderError(f"{self._case.name}: there is no shard")
        return [pid for _, pid in sorted(found)]

    def _committed_s(self) -> float:
        """When the newest checkpoint was committed, by the clock of the times; 0.0 without."""
        manifests = (self._folder / "run" / "checkpoints").glob("*/manifest.json")
        stamps = []
        for path in manifests:
            with contextlib.suppress(OSError):
                stamps.append(path.stat().st_mtime)
        return max(stamps) - time.time() + time.monotonic() if stamps else 0.0


def _times(path: Path, begin: int, count: int | None = None) -> array[float]:
    """Times noted in a file, from number ``begin`` on, or the last ``-begin``."""
    with open(path, "rb") as file:
        there = os.fstat(file.fileno()).st_size // BYTES
        first = max(0, there + begin) if begin < 0 else min(begin, there)
        file.seek(first * BYTES)
        data = file.read(BYTES * (there - first if count is None else min(count, there - first)))
    return array("d", data)
