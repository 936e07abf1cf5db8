"""L-BFGS over all data (mode lbfgs): what it reaches beside torch's own, and what passes through the coordinator.

Logistic regression and a small net on scikit-learn's digits: the loss at the end, evaluations of all data, seconds of
an evaluation, and bytes of commands and answers per iteration and shard. Then with a worker that is late with every
batch, with and without backups of its portions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.contender import ContenderError
from bench_lib.documents import head, write_document

SCHEMA = 1
SCRIPT = Path(__file__).parent / "scripts" / "full_batch.py"
TIMEOUT_S = 600.0
LATE_S = 0.1
"""Of the slow worker, per batch."""
LIMIT_BYTES = 1024
"""Through the coordinator, per iteration and shard."""
SHARDS = 2
PROBLEMS: dict[str, tuple[str, ...]] = {
    "logistic regression": ("--iterations", "200"),
    "net": ("--iterations", "100", "--hidden", "32"),
}


@dataclass(frozen=True)
class Row:
    """One run. ``workers`` 0: torch's L-BFGS in one process."""

    problem: str
    workers: int
    late: bool
    backups: bool
    loss: float
    excess: float
    """loss above that of torch's, relative to it"""
    reason: str
    iterations: int
    evaluations: int
    evaluation_s: float
    step_bytes: int
    """of the median iteration, per shard"""
    most_bytes: int
    copies: int
    """portions that were handed out a second time"""

    @property
    def passed(self) -> bool:
        """Whether the loss is as low as torch's, within 1e-4 of it, or 1 % where it is no convex one."""
        least = 1e-4 if self.problem == "logistic regression" else 1e-2
        return self.excess <= least and self.step_bytes <= LIMIT_BYTES


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    facts = machine.look()
    rows: list[Row] = []
    try:
        for problem in PROBLEMS:
            alone = _row(problem, 0, 0.0)
            rows.append(alone)
            for workers in options.workers:
                rows.append(_row(problem, workers, alone.loss))
                terminal.print(f"{problem}, {workers} done", style="dim")
            for backups in (True, False):
                rows.append(_row(problem, 2, alone.loss, late=True, backups=backups))
                terminal.print(f"{problem}, one late, {'with' if backups else 'no'} backups done", style="dim")
    except ContenderError as error:
        terminal.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    terminal.print(_table(rows))
    if options.json is not None:
        settings = {"shards": SHARDS, "late_s": LATE_S, "limit_bytes": LIMIT_BYTES}
        results = [{**asdict(row), "passed": row.passed} for row in rows]
        write_document(options.json, {**head("sandblaster", SCHEMA, facts), "settings": settings, "results": results})
    return 0


def _row(problem: str, workers: int, reference: float, late: bool = False, backups: bool = True) -> Row:
    """Raises :class:`ContenderError`."""
    with tempfile.TemporaryDirectory(prefix="downpour-sandblaster-") as folder:
        report, run = Path(folder) / "report.json", Path(folder) / "run"
        script = [str(SCRIPT), *PROBLEMS[problem], "--report", str(report), "--slow", str(LATE_S if late else 0.0)]
        command = [sys.executable, *script]
        if workers:
            mode = "lbfgs" if backups else "lbfgs,backup=0"
            job = ["run", "-q", "-w", str(workers), "-s", str(SHARDS), "--mode", mode, "--out", str(run)]
            command = [sys.executable, "-m", "downpour_deploy", *job, *script]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # as each process of a job on few cores has it
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=None if workers else alone
            )
        except subprocess.TimeoutExpired:
            raise ContenderError(f"{problem}: not done after {TIMEOUT_S:g} s") from None
        if done.returncode:
            raise ContenderError(f"{problem}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        found = json.loads(report.read_text(encoding="utf-8"))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if workers else []
    logged = [json.loads(line) for line in lines]
    sizes = [row["bytes_per_shard"] for row in logged if "bytes_per_shard" in row] or [0]
    return Row(
        problem=problem,
        workers=workers,
        late=late,
        backups=backups,
        loss=found["loss"],
        excess=(found["loss"] - reference) / reference if reference else 0.0,
        reason=found["reason"],
        iterations=found["iterations"],
        evaluations=found["evaluations"],
        evaluation_s=found["took_s"] / found["evaluations"],
        step_bytes=round(statistics.median(sizes)),
        most_bytes=max(sizes),
        copies=sum(row["backups"] for row in logged if "minimized" in row),
    )


def _table(rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="L-BFGS over all data", title_justify="left", box=box.SIMPLE)
    table.add_column("problem")
    table.add_column("workers")
    for heading in (
        "loss",
        "above torch's",
        "iterations",
        "evaluations",
        "evaluation, ms",
        "bytes",
        "at most",
        "copies",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        who = str(row.workers or "torch") + (f", one late, {'' if row.backups else 'no '}backups" if row.late else "")
        counts = [str(n) for n in (row.step_bytes, row.most_bytes, row.copies)] if row.workers else [""] * 3
        figures = [f"{row.loss:.6f}", f"{row.excess:.1e}", str(row.iterations), str(row.evaluations)]
        table.add_row(row.problem, who, *figures, f"{row.evaluation_s * 1e3:.0f}", *counts)
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--workers", nargs="+", type=at_least_one, default=[1, 2], help="default 1 2")
    add("--json", type=writable, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
