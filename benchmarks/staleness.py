"""What stale gradients do, and what helps: final losses under injected staleness with every compensation.

Each gradient is pushed some steps after it was computed (``inject_staleness``), so that one worker's is 16 updates
late, always, and one of four's about 15. ``hard`` is a learning rate that only fresh gradients bear; ``mild`` is one
that stale ones bear too, with a worse loss. Whole jobs of ``downpour run``, median of several seeds; the same number of
samples everywhere. Exit status 1: not stalled without compensation, or short of the target with it.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.documents import head, write_document
from bench_lib.machine import look

SCHEMA = 1
SCRIPT = Path(__file__).parent / "scripts" / "late.py"
TIMEOUT_S = 240.0
LOSS = re.compile(r"final loss (\S+)")
STALENESS = re.compile(r"staleness\s+mean ([0-9.]+)")
TARGET = 0.3
"""A loss that ``hard`` is to reach with compensation; chance has 2.3."""
STALLED = 2.0
"""A loss above it is no learning at all."""


@dataclass(frozen=True)
class Case:
    """One problem, for some workers."""

    name: str
    workers: int
    held_back: int
    """steps, which make about 16 updates"""
    script: tuple[str, ...]
    ways: tuple[str, ...]
    """``fresh``: nothing is held back"""
    reach: tuple[str, ...] = ()
    """of these, what is to reach the target, while ``off`` is to stall"""


CASES = [
    Case(
        "hard",
        1,
        16,
        ("--hidden", "32", "--lr", "0.5", "--steps", "2000"),
        ("fresh", "off", "stale-lr", "gap", "dc:0.04"),
        ("stale-lr", "gap"),
    ),
    Case(
        "hard",
        4,
        3,
        ("--hidden", "32", "--lr", "0.5", "--steps", "2000"),
        ("off", "stale-lr", "gap"),
        ("stale-lr", "gap"),
    ),
    Case(
        "mild",
        1,
        16,
        ("--hidden", "0", "--lr", "0.5", "--steps", "600"),
        ("fresh", "off", "dc:1"),
    ),
]


@dataclass(frozen=True)
class Row:
    """A way in a case."""

    case: str
    workers: int
    way: str
    staleness: float
    """mean over the job of the first seed"""
    losses: tuple[float | None, ...]
    """by seed; None: the job ended with NaN or Inf"""

    @property
    def median(self) -> float:
        """Of the losses; infinite where most jobs diverged."""
        return statistics.median(math.inf if loss is None else loss for loss in self.losses)


def job(case: Case, way: str, seed: int, folder: Path) -> tuple[float | None, float]:
    """Final loss and mean staleness of one job."""
    out = folder / f"{case.name}-{case.workers}-{way.replace(':', '_')}-{seed}"
    held_back, compensation = (0, "off") if way == "fresh" else (case.held_back, way)
    command = [sys.executable, "-m", "downpour_deploy", "run", "-q", "-w", str(case.workers), "--seed", str(seed)]
    command += ["--threads", "1", "--out", str(out), "--set", "checkpoint_s=0", "--set", f"compensation={compensation}"]
    command += ["--set", f"inject_staleness={held_back}", str(SCRIPT), *case.script, "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    found = LOSS.search(done.stdout)
    if found is None and "NaN or Inf" not in done.stdout + done.stderr:
        raise RuntimeError(f"{' '.join(command)} printed no loss:\n{done.stdout}{done.stderr}")
    loss = float(found[1]) if found else math.nan
    mean = STALENESS.search(done.stdout + done.stderr)
    return (loss if math.isfinite(loss) else None), float(mean[1]) if mean else 0.0


def missed(case: Case, rows: list[Row]) -> list[str]:
    """What was to come out and did not."""
    if not case.reach:
        return []
    median = {row.way: row.median for row in rows}
    found = [] if median["off"] > STALLED else [f"{case.name}, {case.workers} worker(s): off has learned"]
    found += [f"{case.name}, {case.workers} worker(s): {w} is short" for w in case.reach if median[w] > TARGET]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least_one, default=3, help="default 3")
    parser.add_argument("--cases", nargs="+", choices=sorted({c.name for c in CASES}), help="default: all")
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write everything here")
    args = parser.parse_args(arguments)
    rows: list[Row] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if args.cases and case.name not in args.cases:
                continue
            own = []
            for way in case.ways:
                results = [job(case, way, seed, Path(folder)) for seed in range(args.seeds)]
                own.append(Row(case.name, case.workers, way, results[0][1], tuple(loss for loss, _ in results)))
                print(_line(own[-1]), flush=True)
            rows += own
            problems += missed(case, own)
            if args.json is not None:
                document: dict[str, Any] = head("staleness", SCHEMA, look())
                document |= {"target": TARGET, "stalled": STALLED, "cases": [asdict(case) for case in CASES]}
                document["rows"] = [{**asdict(row), "median": _finite(row.median)} for row in rows]
                write_document(args.json, document)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(row: Row) -> str:
    losses = ", ".join("diverged" if loss is None else f"{loss:.3f}" for loss in row.losses)
    which = f"{row.case:5} {row.workers} worker(s)  {row.way:14} staleness {row.staleness:5.1f}"
    return f"{which}  loss {row.median:8.3f}  ({losses})"


if __name__ == "__main__":
    sys.exit(main())
