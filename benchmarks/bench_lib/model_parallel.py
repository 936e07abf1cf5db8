"""Replicas of several workers: what is measured, by real jobs of ``downpour run`` and the traces that they leave."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench_lib.contender import ContenderError
from bench_lib.local_job import SCRIPTS, GatedPrograms
from bench_lib.runner import Runner, Say
from downpour_common.spans import FILE
from downpour_deploy.trace.measure import WARM_UP, measure, theory
from downpour_deploy.trace.measure import utilisation as busy_share
from downpour_deploy.trace.read import Trace, parse

STAGES, INTERLEAVE = 4, 2
FORWARD_MS = 20.0
"""of a micro-batch in a rank's stages together; going back it takes twice that"""
SLEEP_STEPS, DENSE_STEPS, PART_STEPS = 14, 3, 6
MICROBATCHES = (4, 8, 16)
MEMORY_MICROBATCHES = (4, 8, 16, 32)
MODELS = ("mlp25m", "transformer")
WAYS: dict[str, tuple[str, ...]] = {
    "unsplit": (),
    "tensor 2": ("--tensor", "2"),
    "pipeline 2": ("--pipeline", "2"),
}
TURN_STEPS = {"mlp25m": 8, "transformer": 3}
AIM_UTILISATION, AIM_SHARE, AIM_WEIGHTS, AIM_FLAT = 0.10, 0.55, 1e-5, 1.05
SPLIT_RUNS = Path(__file__).resolve().parents[2] / "tests" / "parallel" / "split_runs.py"
SPLIT_RUNS_S = 1200.0

Row = dict[str, Any]


def utilisation(timeout_s: float, say: Say) -> list[Row]:
    """Of a pipeline of four stages that sleep, beside m / (m + 3). Raises :class:`ContenderError`."""
    rows = []
    for schedule in ("gpipe", "1f1b", "interleaved"):
        per_rank = INTERLEAVE if schedule == "interleaved" else 1
        for count in MICROBATCHES:
            script = ["stages.py", "--kind", "sleep", "--stages", str(STAGES * per_rank), "--steps", str(SLEEP_STEPS)]
            script += ["--microbatches", str(count), "--forward-ms", str(FORWARD_MS / per_rank)]
            with _traced(STAGES, _pipeline(schedule, count), script, timeout_s) as trace:
                found, whole = of_steps(trace), measure(trace).replicas[0].utilisation
            middle, best = statistics.median(found), theory(count, STAGES, per_rank)
            row: Row = {"schedule": schedule, "microbatches": count, "steps": found, "reported": whole}
            row |= {"utilisation": middle, "theory": best}
            if per_rank == 1:
                row["met"] = abs(middle / best - 1) <= AIM_UTILISATION
            rows.append(row)
            say(f"{schedule}, {count} micro-batches: {middle:.3f} of {best:.3f}")
    return rows


def of_steps(trace: Trace) -> list[float]:
    """The utilisation of each step, without the first ones."""
    steps = range(WARM_UP, SLEEP_STEPS)
    return [busy_share([[s for s in p.spans if s.step == step] for p in trace.processes]) for step in steps]


def memory(timeout_s: float, say: Say) -> list[Row]:
    """Bytes that autograd keeps at most, and the process' peak, of each rank. Raises :class:`ContenderError`."""
    rows = []
    for schedule in ("gpipe", "1f1b"):
        for count in MEMORY_MICROBATCHES:
            script = ["stages.py", "--kind", "dense", "--stages", str(STAGES), "--steps", str(DENSE_STEPS)]
            script += ["--microbatches", str(count)]
            with _traced(STAGES, _pipeline(schedule, count), script, timeout_s) as trace:
                sizes = [process.sizes for process in trace.processes]
            row: Row = {"schedule": schedule, "microbatches": count}
            row |= {key: [size[key] for size in sizes] for key in ("activations", "peak_memory")}
            rows.append(row)
            say(f"{schedule}, {count} micro-batches: {max(row['activations']) / 1e6:.1f} MB at most")
    return rows


def grows(rows: Sequence[Row], schedule: str) -> float:
    """What a rank keeps with the most micro-batches, over what it keeps with the fewest; of the rank with the most."""
    found = [max(row["activations"]) for row in rows if row["schedule"] == schedule]
    return float(found[-1] / found[0])


def parts(timeout_s: float, say: Say) -> list[Row]:
    """Bytes that each rank holds and moves, over those of an unsplit worker. Raises :class:`ContenderError`."""
    rows: list[Row] = []
    for model in MODELS:
        whole: dict[str, int] = {}
        for way, options in WAYS.items():
            script = ["split.py", "--model", model, "--steps", str(PART_STEPS)]
            with _traced(2 if options else 1, options, script, timeout_s) as trace:
                ranks = [
                    {"weights": p.sizes["weights"], "moved": p.moved["pushed"] + p.moved["pulled"]}
                    for p in trace.processes
                ]
            whole = whole or ranks[0]
            row: Row = {"model": model, "way": way, "ranks": ranks}
            row |= {f"{key}_share": max(rank[key] for rank in ranks) / whole[key] for key in whole}
            if way == "tensor 2":
                row["met"] = max(row["weights_share"], row["moved_share"]) <= AIM_SHARE
            rows.append(row)
            say(f"{model}, {way}: holds {row['weights_share']:.3f}, moves {row['moved_share']:.3f}")
    return rows


class SplitJob:
    """One replica that trains, at the gate between turns."""

    def __init__(self, model: str, way: str, timeout_s: float) -> None:
        self.name = way
        self._model = model
        self._workers = 2 if WAYS[way] else 1
        self._programs = GatedPrograms(f"{model}, {way}", self._workers, timeout_s)

    def start(self) -> None:
        """Start the job and wait until all ranks are at the gate. Raises :class:`ContenderError`."""
        script = [str(SCRIPTS / "split.py"), "--model", self._model]
        self._programs.add_job(["-w", str(self._workers), *_JOB, *WAYS[self.name]], script)
        self._programs.await_ready()

    def run_once(self) -> float:
        """Seconds of a step, by one turn."""
        steps = TURN_STEPS[self._model]
        return self._programs.turn(1, steps).seconds / steps

    def close(self) -> None:
        """End it."""
        self._programs.close()


def steps(rounds: int, timeout_s: float, say: Say) -> list[Row]:
    """Times of steps, of jobs that take turns. Raises :class:`ContenderError`."""
    rows: list[Row] = []
    for model in MODELS:
        outcome = Runner({way: partial(SplitJob, model, way, timeout_s) for way in WAYS}, say).run(rounds, 1)
        if outcome.failed:
            raise ContenderError(f"{model}: " + "; ".join(f"{way}: {why}" for way, why in outcome.failed.items()))
        middles = {way: statistics.median(outcome.samples_s[way]) for way in WAYS}
        for way, middle in middles.items():
            row = {"model": model, "way": way, "samples_s": outcome.samples_s[way], "step_s": middle}
            rows.append({**row, "ratio": middle / middles["unsplit"]})
    return rows


def weights() -> list[Row]:
    """How far weights after 20 steps are from one plain process', by the test suite's own table.

    Raises :class:`ContenderError`.
    """
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, str(SPLIT_RUNS), "--json", str(file)]
        done = _run("split_runs.py", command, SPLIT_RUNS_S)
        if not file.is_file():
            raise ContenderError(f"split_runs.py: {done.stderr[-2000:] or done.stdout[-2000:]}")
        rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))
    return [{**row, "met": row["largest_difference"] <= AIM_WEIGHTS} for row in rows]


_JOB = ("-s", "1", "--mode", "sync")


def _pipeline(schedule: str, microbatches: int) -> tuple[str, ...]:
    options = ("--pipeline", str(STAGES), "--schedule", schedule, "--microbatches", str(microbatches))
    return (*options, "--threads", "1")


@contextmanager
def _traced(workers: int, options: Sequence[str], script: Sequence[str], timeout_s: float) -> Iterator[Trace]:
    """The trace of a job that has run to its end. Raises :class:`ContenderError`."""
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        out = Path(folder, "run")
        job = ["run", "-q", "--trace", "-w", str(workers), *_JOB, "--out", str(out), "--set", "checkpoint_s=0"]
        command = [sys.executable, "-m", "downpour_deploy", *job, *options, str(SCRIPTS / script[0]), *script[1:]]
        done = _run(" ".join(script), command, timeout_s)
        if done.returncode:
            raise ContenderError(f"{' '.join(script)}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        with open(out / FILE, "rb") as file:
            yield parse(file, str(out))


def _run(name: str, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ContenderError(f"{name}: not done after {timeout_s:g} s") from None
