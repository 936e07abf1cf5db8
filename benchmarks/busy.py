"""What does communication cost a busy Python thread of the same process, and the thread it?

Goodput of pushes (and of steps, which push and pull) while nothing else goes on and while a second thread runs pure
Python, over shared memory and over TCP; and that thread's loops a second with and without pushes beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.busy import BusyJob
from bench_lib.documents import head, write_document

WAYS = {"memory": (), "tcp": ("--set", "transport=tcp")}
REPEATS = 5
WARMUPS = 1
AIM = 0.6
SCHEMA = 1


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console
    from bench_lib.runner import Runner

    terminal = console()
    facts = machine.look()
    timeout_s = 60.0 + options.mb
    jobs = {way: BusyJob(way, options.mb, timeout_s, extra, REPEATS) for way, extra in WAYS.items()}
    try:
        runner = Runner({way: partial(jobs.__getitem__, way) for way in jobs}, terminal.print)
        outcome = runner.run(options.runs, WARMUPS)
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    rows = {way: _row(job, options.mb) for way, job in jobs.items() if way in outcome.samples_s}
    terminal.print(_table(rows, options))
    if options.json is not None:
        document = {
            **head("busy", SCHEMA, facts),
            "settings": {"megabytes": options.mb, "runs": options.runs, "repeats": REPEATS},
            "aim": AIM,
            "results": rows,
            "failed": outcome.failed,
        }
        write_document(options.json, document)
    return 1 if outcome.failed else 0


def _row(job: BusyJob, megabytes: int) -> dict[str, Any]:
    """Medians of one way; GB/s count the payload once in a push and twice in a step."""
    seconds = {task: statistics.median(samples.seconds[WARMUPS:]) for task, samples in job.samples.items()}
    loops = {task: statistics.median(samples.loops_per_s[WARMUPS:]) for task, samples in job.samples.items()}
    gigabytes = megabytes / 1000
    return {
        "push_gb_per_s": gigabytes / seconds["push"],
        "busy_push_gb_per_s": gigabytes / seconds["busy-push"],
        "push_kept": seconds["push"] / seconds["busy-push"],
        "step_gb_per_s": 2 * gigabytes / seconds["step"],
        "busy_step_gb_per_s": 2 * gigabytes / seconds["busy-step"],
        "step_kept": seconds["step"] / seconds["busy-step"],
        "loops_per_s": loops["busy-loops"],
        "loops_kept_beside_push": loops["busy-push"] / loops["busy-loops"],
        "loops_kept_beside_step": loops["busy-step"] / loops["busy-loops"],
        "passed": seconds["push"] / seconds["busy-push"] >= AIM,
        "samples": {task: asdict(samples) for task, samples in job.samples.items()},
    }


def _table(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> Any:
    from rich import box
    from rich.table import Table

    title = f"{options.mb} MB, one worker, one shard; medians of {options.runs} turns; busy: a thread of pure Python"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("", "GB/s idle", "GB/s busy", "kept", "loops kept", f"aim ≥ {AIM:g}"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, row in rows.items():
        for what in ("push", "step"):
            table.add_row(
                f"{way}, {'push' if what == 'push' else 'push and pull'}",
                f"{row[f'{what}_gb_per_s']:.2f}",
                f"{row[f'busy_{what}_gb_per_s']:.2f}",
                f"{row[f'{what}_kept']:.2f}",
                f"{row[f'loops_kept_beside_{what}']:.2f}",
                ("reached" if row["passed"] else "not reached") if what == "push" else "",
            )
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--mb", type=at_least_one, default=100, help="payload one way, in 10^6 bytes (default 100)")
    add("--runs", type=at_least_one, default=5, help="timed turns (default 5)")
    add("--json", type=writable, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
