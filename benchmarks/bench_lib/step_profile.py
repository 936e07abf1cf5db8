"""Runs a job with its functions timed, and sums up where its steps' time went."""

from __future__ import annotations

import bisect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_lib.contender import ContenderError
from bench_lib.documents import write_document
from bench_lib.machine import Machine, look
from downpour_common.process import die_with_parent, prepare_child

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent.parent
MAIN_THREAD = "MainThread"
TAIL_CHARACTERS = 3000


@dataclass(frozen=True)
class Wanted:
    """What is to be profiled."""

    model: str
    optimizer: str
    mode: str
    workers: int
    shards: int
    settings: tuple[str, ...]
    """``key=value``, as for ``downpour run --set``"""
    steps: int
    warmup: int
    """steps before those, not counted"""


@dataclass(frozen=True)
class Phase:
    """Medians per step: seconds, of it on the processor, and calls."""

    name: str
    thread: str
    """empty: the process' main thread"""
    wall_s: float
    cpu_s: float
    calls: float


@dataclass(frozen=True)
class Side:
    """One process: ``side`` is worker or shard."""

    side: str
    rank: int
    phases: list[Phase]


@dataclass(frozen=True)
class Profile:
    """A job's profile. ``step_s``: median of worker 0's steps."""

    date: str
    machine: Machine
    wanted: Wanted
    step_s: float
    sides: list[Side]
    missing: list[str]
    """functions that were to be timed and are not there"""


def run(wanted: Wanted, timeout_s: float) -> Profile:
    """Run the job to its end. Raises :class:`ContenderError`."""
    machine = look()
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        records = os.path.join(folder, "records")
        os.mkdir(records)
        _run_job(wanted, folder, records, timeout_s)
        documents = [json.loads(path.read_text()) for path in sorted(Path(records).iterdir())]
    return summarise(wanted, machine, documents)


def _run_job(wanted: Wanted, folder: str, records: str, timeout_s: float) -> None:
    command = [sys.executable, "-m", "downpour_deploy", "run", "-q", "--out", os.path.join(folder, "out")]
    command += ["-w", str(wanted.workers), "-s", str(wanted.shards), "--mode", wanted.mode]
    for setting in ("checkpoint_s=0", *wanted.settings):
        command += ["--set", setting]
    command += [str(FOLDER / "scripts" / "profiled.py"), "--model", wanted.model, "--optimizer", wanted.optimizer]
    command += ["--steps", str(wanted.warmup + wanted.steps)]
    path = os.pathsep.join(filter(None, [str(FOLDER / "profile_hook"), os.environ.get("PYTHONPATH", "")]))
    prepare_child()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "BENCH_PROFILE": records, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            preexec_fn=die_with_parent,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ContenderError(f"the job has not ended within {timeout_s:g} s") from None
    if done.returncode:
        raise ContenderError(f"the job ended with exit code {done.returncode}:\n{done.stdout[-TAIL_CHARACTERS:]}")


def summarise(wanted: Wanted, machine: Machine, documents: Sequence[Mapping[str, Any]]) -> Profile:
    """From what the processes recorded. A shard's time is divided among worker 0's steps."""
    workers = sorted((d for d in documents if d["side"] == "worker"), key=lambda d: d["rank"])
    shards = sorted((d for d in documents if d["side"] == "shard"), key=lambda d: d["rank"])
    if len(workers) != wanted.workers or len(shards) != wanted.shards:
        raise ContenderError(f"{len(workers)} workers and {len(shards)} shards have left records")
    first = workers[0]["steps"][wanted.warmup :]
    sides = []
    for document in (*workers, *shards):
        bounds = document["steps"][wanted.warmup :] or first
        sides.append(Side(document["side"], document["rank"], _phases(document["events"], bounds)))
    return Profile(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        wanted=wanted,
        step_s=statistics.median(later - earlier for earlier, later in pairwise(first)),
        sides=sides,
        missing=sorted({name for document in documents for name in document["missing"]}),
    )


def _phases(events: Sequence[tuple[str, str, float, float, float]], bounds: Sequence[float]) -> list[Phase]:
    """Medians over the steps that ``bounds`` separate, in order of time; what never took any is left out."""
    steps = len(bounds) - 1
    sums: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[0.0, 0.0, 0.0] for _ in range(steps)])
    for phase, thread, ended_s, wall_s, cpu_s in events:
        step = bisect.bisect_left(bounds, ended_s) - 1
        if 0 <= step < steps:
            entry = sums[phase, "" if thread == MAIN_THREAD else thread][step]
            entry[0] += wall_s
            entry[1] += cpu_s
            entry[2] += 1
    found = [
        Phase(phase, thread, *(statistics.median(column) for column in zip(*entries, strict=True)))
        for (phase, thread), entries in sums.items()
    ]
    return sorted((p for p in found if p.calls), key=lambda p: (p.thread, -p.wall_s))


def write_json(profile: Profile, path: Path) -> None:
    """Replaces the file in one step."""
    write_document(path, {"schema": SCHEMA, "benchmark": "profile", **asdict(profile)})
