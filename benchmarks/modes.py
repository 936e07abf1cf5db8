"""Does every way to coordinate learn? Each mode beside one process, with the same number of samples, for several seeds.

Each run is a whole ``downpour run`` of two workers and two shards (or ``python SCRIPT``): the digits CNN and the
character transformer of the examples. What counts is the model that the run leaves behind, tested on data that it has
not seen. Prints a table and writes JSON.
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

from bench_lib.arguments import at_least_one, at_least_zero, writable
from bench_lib.contender import ContenderError
from bench_lib.documents import before, head, write_document

SCHEMA = 1
SCRIPTS = Path(__file__).resolve().parent / "scripts"
SCRIPT = SCRIPTS / "modes_job.py"
TIMEOUT_S = 300.0
BATCH = 16
LR = {"digits": 0.003, "chars": 0.003}
PASSES = {"digits": 15, "chars": 6}
ALONE = "one process"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Way:
    """How a job is run. ``lr``: factor of the learning rate, where a mode needs another one than ``sync``."""

    mode: str
    workers: int = 2
    options: tuple[str, ...] = ()
    lr: float = 1.0


WAYS: dict[str, Way] = {
    "sync": Way("sync"),
    "sync,backup=1": Way("sync,backup=1", 3),
    "sync;1=async": Way("sync;1=async"),
    "ssp:4": Way("ssp:4", lr=0.7),
    "async": Way("async", lr=0.7),
    "async n_push=5": Way("async", options=("--set", "n_push=5", "--set", "n_fetch=5"), lr=0.7),
    "async stale-lr": Way("async", options=("--set", "compensation=stale-lr"), lr=0.7),
    "async dc": Way("async", options=("--set", "compensation=dc:0.04"), lr=0.7),
    "average:10": Way("average:10"),
    "average:50": Way("average:50"),
    "easgd:10": Way("easgd:10"),
    "easgd:50": Way("easgd:50"),
    "diloco:10": Way("diloco:10"),
    "diloco:50": Way("diloco:50"),
    "diloco:50 in 4 fragments": Way("diloco:50,fragments=4"),
}
"""By name. One process has batches twice as large, which is what ``sync`` makes of two workers."""


@dataclass(frozen=True)
class Row:
    """One run."""

    workload: str
    way: str
    seed: int
    loss: float
    """on the test data, in nats"""
    accuracy: float
    """on the test data, 0 to 1"""
    moved: int
    """payload bytes between workers and shards"""
    train_s: float
    samples: int


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    kept = before(options.json, "modes", SCHEMA).get("results", []) if options.json and options.add else []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    chosen = {(workload, way, seed) for workload in options.workloads for way in options.ways for seed in seeds}
    rows = [row for row in (Row(**values) for values in kept) if (row.workload, row.way, row.seed) not in chosen]
    document = {**head("modes", SCHEMA, machine.look()), "passes": PASSES, "batch": BATCH}
    try:
        for seed in seeds:
            for workload in options.workloads:
                for way in options.ways:
                    row = run(workload, way, seed, options.quick)
                    rows.append(row)
                    terminal.print(f"{workload} {way} seed {seed}: {row.loss:.4f} {row.accuracy:.4f}", style="dim")
            if options.json:
                write_document(options.json, document | {"results": [asdict(row) for row in rows]})
    except ContenderError as error:
        terminal.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    terminal.print(_table(rows))
    return 0


def run(workload: str, way: str, seed: int, quick: bool) -> Row:
    """One run. Raises :class:`ContenderError` with its output when it fails."""
    passes = max(1, PASSES[workload] // 10) if quick else PASSES[workload]
    with tempfile.TemporaryDirectory(prefix="downpour-modes-") as folder:
        model = Path(folder) / "model.safetensors"
        common = [workload, "--passes", str(passes), "--seed", str(seed)]
        if way == ALONE:
            lr = str(LR[workload])
            command = [
                sys.executable,
                str(SCRIPT),
                *common,
                "--batch",
                str(2 * BATCH),
                "--lr",
                lr,
                "--save",
                str(model),
            ]
            _finished(command, f"{workload} {way}")
            loss, accuracy = _judge(workload, model, seed)
            return Row(workload, way, seed, loss, accuracy, 0, 0.0, 0)
        how, out = WAYS[way], Path(folder) / "run"
        command = [sys.executable, "-m", "downpour_deploy", "run", "-q", "--json", "-w", str(how.workers), "-s", "2"]
        command += ["--mode", how.mode, "--seed", str(seed), "--out", str(out), "--set", "checkpoint_s=0", *how.options]
        command += [str(SCRIPT), *common, "--batch", str(BATCH), "--lr", str(how.lr * LR[workload])]
        result: dict[str, Any] = json.loads(_finished(command, f"{workload} {way}"))
        loss, accuracy = _judge(workload, out / "model.safetensors", seed)
    return Row(workload, way, seed, loss, accuracy, result["bytes"], result["train_s"], result["samples"])


def _finished(command: list[str], name: str) -> str:
    """What it wrote."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, **ONE_THREAD}
        )
    except subprocess.TimeoutExpired:
        raise ContenderError(f"{name}: did not end within {TIMEOUT_S:g} s") from None
    if done.returncode:
        raise ContenderError(f"{name}: exit code {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return done.stdout


def _judge(workload: str, weights: Path, seed: int) -> tuple[float, float]:
    """Loss and accuracy of what a run has left behind."""
    import safetensors.torch
    import torch

    sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent.parent / "examples")]
    try:
        import modes_job
    finally:
        del sys.path[:2]
    torch.manual_seed(seed)
    sys.path.insert(0, str(modes_job.EXAMPLES))
    model, _, inputs, labels = modes_job.WORKLOADS[workload]()
    sys.path.pop(0)
    model.load_state_dict(safetensors.torch.load_file(weights), strict=False)
    return modes_job.judged(workload, model, inputs, labels)


def _table(rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table("workload", "mode", "loss", "of one process", "accuracy", "MB", "of sync's", "s")
    for workload in dict.fromkeys(row.workload for row in rows):
        here = [row for row in rows if row.workload == workload]
        alone = _median([row.loss for row in here if row.way == ALONE])
        all_bytes = _median([float(row.moved) for row in here if row.way == "sync"])
        for way in dict.fromkeys(row.way for row in here):
            mine = [row for row in here if row.way == way]
            loss, moved = _median([r.loss for r in mine]), _median([float(r.moved) for r in mine])
            table.add_row(
                workload,
                way,
                f"{loss:.4f}",
                f"{100 * (loss / alone - 1):+.1f} %" if alone else "",
                f"{_median([r.accuracy for r in mine]):.4f}",
                f"{moved / 1e6:.1f}",
                f"1/{all_bytes / moved:.1f}" if all_bytes and moved else "",
                f"{_median([r.train_s for r in mine]):.1f}",
            )
    return table


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [ALONE, *WAYS]
    parser.add_argument("--workloads", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--only", dest="ways", nargs="+", choices=known, default=known, metavar="MODE")
    parser.add_argument("--list", action="store_true", help="name the modes, run nothing")
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--first-seed", type=at_least_zero, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the passes: does everything run?")
    parser.add_argument("--json", type=writable, help="write the results to this file")
    parser.add_argument("--add", action="store_true", help="keep what else the file has")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(known))
        parser.exit()
    return options


if __name__ == "__main__":
    sys.exit(main())
