"""Does every mode learn? The digits examples in each mode beside one process, median of several seeds.

Each run is a whole ``downpour run`` (or ``python SCRIPT``) with the script's own defaults, so all see the same number
of samples. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench_lib.documents import write_document

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODES = ["one process", "async", "async n_push=5 n_fetch=10", "ssp:2", "sync"]
ACCURACY = re.compile(r"final test accuracy ([0-9.]+)")


def accuracy(script: str, mode: str, seed: int, folder: str) -> float:
    """The last test accuracy that the script prints, 0 to 1."""
    arguments = [str(EXAMPLES / script), "--seed", str(seed)]
    command = [sys.executable, *arguments]
    if mode != "one process":
        name, *settings = mode.split()
        out = Path(folder) / f"{script}-{mode}-{seed}".replace(" ", "_")
        launcher = [sys.executable, "-m", "downpour_deploy", "run", "-q", "-w", "2", "-s", "2", "--mode", name]
        launcher += ["--seed", str(seed), "--out", str(out)]
        for setting in settings:
            launcher += ["--set", setting]
        command = [*launcher, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = ACCURACY.findall(done.stdout)
    if not found:
        raise RuntimeError(f"{script} in mode {mode} printed no accuracy:\n{done.stdout}{done.stderr}")
    return float(found[-1])


def main() -> None:
    """Run everything, one run at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scripts", nargs="+", default=["digits_mlp.py", "digits_cnn.py"])
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="write all accuracies to this file")
    args = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    table = Table(title=f"test accuracy, median (all) of {args.seeds} seeds; 2 workers, 2 shards")
    table.add_column("script")
    for mode in args.modes:
        table.add_column(mode)
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            row = results[script] = {}
            for mode in args.modes:
                row[mode] = [accuracy(script, mode, seed, folder) for seed in range(args.seeds)]
                print(script, mode, row[mode], flush=True)
            cells = [f"{statistics.median(v):.4f} ({', '.join(f'{x:.4f}' for x in v)})" for v in row.values()]
            table.add_row(script, *cells)
    Console(width=200).print(table)
    if args.json:
        write_document(Path(args.json), results)


if __name__ == "__main__":
    main()
