"""What does a frozen worker cost the others, in rounds that do without the slowest (``sync,backup=b``)?

A real job of ``downpour run`` with several workers, ``b`` of them as backups, whose steps sleep rather than compute.
In each turn all train for a while, then one is stopped (SIGSTOP) for as long, then it goes on. Told is the median
length of the others' steps in both, and how many contributions came too late. For comparison: strict rounds of as many
workers, undisturbed; with one frozen they would stand still.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.backup_job import BackupJob
from bench_lib.contender import ContenderError
from bench_lib.documents import head, write_document

AIM = 1.2
"""Largest length of a step with one frozen, in normal ones."""
SCHEMA = 1


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    facts = machine.look()
    try:
        row = _measure(options)
    except ContenderError as error:
        terminal.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    terminal.print(
        f"{row['mode']}, {options.workers} workers, steps of {options.step_ms:g} ms: {row['normal_ms']:.1f} ms, "
        f"{row['frozen_ms']:.1f} ms with one frozen: {row['ratio']:.2f} times (aim ≤ {AIM:g}); strict rounds "
        f"{row['strict_ms']:.1f} ms; late contributions: {row['late']}",
        markup=False,
    )
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("workers", "backup", "step_ms", "runs", "window")}
        write_document(options.json, {**head("backup_workers", SCHEMA, facts), "settings": settings, "aim": AIM, **row})
    return 0 if row["passed"] else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises :class:`ContenderError`."""
    mode = f"sync,backup={options.backup}"
    job = BackupJob(mode, options.workers, options.step_ms, options.timeout)
    try:
        job.start()
        turns = [job.turn(options.window) for _ in range(options.runs)]
        document = job.end()
    finally:
        job.close()
    strict = BackupJob("sync", options.workers, options.step_ms, options.timeout)
    try:
        strict.start()
        strict_s = [strict.undisturbed(options.window) for _ in range(options.runs)]
        strict.end()
    finally:
        strict.close()
    ratio = statistics.median(turn.ratio for turn in turns)
    victim = f"worker/{options.workers - 1}"
    return {
        "mode": mode,
        "normal_ms": 1000 * statistics.median(statistics.median(turn.normal_s) for turn in turns),
        "frozen_ms": 1000 * statistics.median(statistics.median(turn.frozen_s) for turn in turns),
        "strict_ms": 1000 * statistics.median(statistics.median(each) for each in strict_s),
        "ratio": ratio,
        "ratios": [turn.ratio for turn in turns],
        "steps": document["steps"],
        "pushes": document["pushes"],
        "late": document["late"],
        "passed": ratio <= AIM and document["late"].get(victim, 0) >= options.runs,
        "turns_ms": [
            {"normal": 1000 * statistics.median(turn.normal_s), "frozen": 1000 * statistics.median(turn.frozen_s)}
            for turn in turns
        ],
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--workers", type=at_least_one, default=5, help="the backups included (default 5)")
    add("--backup", type=at_least_one, default=1, help="workers that a round does without (default 1)")
    add("--step-ms", type=float, default=50.0, help="sleep in each step (default 50)")
    add("--window", type=float, default=5.0, help="seconds of each measurement (default 5)")
    add("--runs", type=at_least_one, default=5, help="turns (default 5)")
    add("--timeout", type=float, default=120.0, help="seconds until something that does not happen has failed")
    add("--json", type=writable, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
