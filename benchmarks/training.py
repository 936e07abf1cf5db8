"""Whole training loops: how many samples a second, beside one process, DDP, and processes that do not communicate?

`python benchmarks/training.py --help`; benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from bench_lib.arguments import at_least_one, at_least_zero, writable
from bench_lib.training import TRAINERS, WORKLOADS, TrainingContender, Workload, trainers_for

DEFAULT = ["mlp25m-sgd", "mlp25m-adam", "digits-adam"]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    if options.list:
        for trainer in TRAINERS:
            print(f"{trainer.name:<24}{trainer.group}")
        return 0
    return _measure([w for w in WORKLOADS if w.name in options.workloads], options)


def _measure(workloads: list[Workload], options: argparse.Namespace) -> int:
    from bench_lib import machine
    from bench_lib.report import console
    from bench_lib.runner import Runner
    from bench_lib.training_report import show
    from bench_lib.training_results import conclude, write_json

    terminal = console()
    failed = False
    try:
        for workload in workloads:
            trainers = [t for t in trainers_for(workload) if not options.only or t.name in options.only]
            facts = machine.look()
            builders = {t.name: partial(TrainingContender, t, workload, options.timeout) for t in trainers}
            runner = Runner(builders, partial(terminal.print, style="dim", markup=False))
            section = conclude(workload, trainers, options.runs, facts, runner.run(options.runs, options.warmup))
            show(section, terminal)
            failed = failed or bool(section.failed)
            if options.json is not None:
                write_json([section], options.json)
                terminal.print(f"written: {options.json}", style="dim", markup=False)
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    names = [workload.name for workload in WORKLOADS]
    trainers = [trainer.name for trainer in TRAINERS]
    add("--workloads", nargs="+", metavar="NAME", choices=names, default=DEFAULT, help=f"of {', '.join(names)}")
    add("--runs", type=at_least_one, default=5, help="timed turns per contender (default 5)")
    add("--warmup", type=at_least_zero, default=1, help="turns before those, not counted (default 1)")
    add("--only", nargs="+", metavar="NAME", choices=trainers, help="only these contenders (see --list)")
    add("--timeout", type=float, default=120.0, help="longest wait for a start or a turn, in seconds (default 120)")
    add("--json", type=writable, metavar="FILE", help="also write everything here; other workloads in it stay")
    add("--list", action="store_true", help="list the contenders and stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
