"""Runs all benchmarks one after the other: `make bench` (quick) and `make bench-full`.

The full run writes benchmarks/results/*.json, then the README's tables and the plots from them. The quick one writes to
benchmarks/results/quick/, which is not kept in the repository, and changes nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Benchmark:
    """A script here, and what it is given; ``quick`` None: not in the quick run."""

    name: str
    quick: Sequence[str] | None
    full: Sequence[str] = ()


QUICK_TRAINERS = ("plain", "two-plain", "ddp-gloo", "downpour-1", "downpour-async-2", "downpour-sync-2")
BENCHMARKS = (
    Benchmark("pushpull", ["--runs", "5"]),
    Benchmark("training", ["--workloads", "mlp25m-sgd", "digits-adam", "--only", *QUICK_TRAINERS]),
    Benchmark("busy", ["--runs", "3"], ["--runs", "7"]),
    Benchmark("memory", ["--optimizers", "sgd"]),
    Benchmark("snapshots", ["--optimizers", "sgd", "--only", "downpour-1", "--pairs", "3"]),
    Benchmark("recovery", ["--quick"]),
    Benchmark("model_parallel", ["--only", "utilisation", "memory"]),
    Benchmark("layerwise", ["--workers", "1", "--batches", "64", "--steps", "4"]),
    Benchmark("control_plane", ["--runs", "3"]),
    Benchmark("accuracy", None),
)


def main(arguments: list[str] | None = None) -> int:
    """Run them; 0 when all went well, 1 when one did not (the others run all the same), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of most of an hour")
    parser.add_argument("--only", nargs="+", choices=[b.name for b in BENCHMARKS], help="only these")
    options = parser.parse_args(arguments)
    folder = RESULTS / "quick" if options.quick else RESULTS
    folder.mkdir(exist_ok=True)
    chosen = [b for b in BENCHMARKS if not options.only or b.name in options.only]
    commands = {}
    for benchmark in chosen:
        given = benchmark.quick if options.quick else benchmark.full
        if given is not None:
            commands[benchmark.name] = [*given, "--json", str(folder / f"{benchmark.name}.json")]
    if not options.quick:
        commands |= {"table": [], "plots": []}
    return _run(commands)


def _run(commands: dict[str, list[str]]) -> int:
    codes: dict[str, int] = {}
    for name, given in commands.items():
        print(f"\n== {name} {' '.join(given)}", flush=True)
        began_s = time.monotonic()
        try:
            codes[name] = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *given], check=False).returncode
        except KeyboardInterrupt:
            return 130
        print(f"== {name}: {time.monotonic() - began_s:.0f} s, exit code {codes[name]}", flush=True)
        if codes[name] == 130:
            return 130
    bad = [name for name, code in codes.items() if code]
    print(f"\nnot well: {', '.join(bad)}" if bad else "\nall well", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
