"""How long is it until a job goes on after one of its processes was killed, and what does being ready for it cost?

Real jobs of ``downpour run``, whose processes are killed with SIGKILL while two workers train; benchmarks/README.md
says what is measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.contender import ContenderError
from bench_lib.documents import before, head, write_document
from bench_lib.machine import Machine
from bench_lib.recovery import CASES, COSTS, NAMES, QUICK, Case, Cost, paired, summary
from bench_lib.recovery_job import RecoveryJob

SCHEMA = 1
WARMUPS = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    if options.list:
        print("\n".join(NAMES))
        return 0
    from bench_lib import machine
    from bench_lib.recovery_report import show
    from bench_lib.report import console

    terminal = console()
    wanted = options.only or (QUICK if options.quick else NAMES)
    facts = machine.look()
    results: dict[str, dict[str, Any]] = {"recoveries": {}, "costs": {}}
    failed: dict[str, str] = {}
    say = partial(terminal.print, style="dim", markup=False)
    try:
        for case in (case for case in CASES if case.name in wanted):
            limited = replace(case, kills=min(case.kills, options.kills), jobs=min(case.jobs, options.kills))
            try:
                results["recoveries"][case.name] = _recoveries(limited, options.timeout)
            except ContenderError as error:
                failed[case.name] = str(error)
            say(f"{case.name} {'failed: ' + failed[case.name] if case.name in failed else 'done'}")
        for cost in (cost for cost in COSTS if cost.name in wanted):
            found, problems = _cost(cost, options.pairs, options.timeout)
            results["costs"] |= found
            failed |= problems
            say(f"{cost.name} {'failed' if problems else 'done'}")
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    show(results, terminal)
    if options.json is not None:
        _write(options.json, facts, results, failed)
    return 1 if failed else 0


def _recoveries(case: Case, timeout_s: float) -> dict[str, Any]:
    """Raises :class:`ContenderError`."""
    found, documents, control = [], [], []
    for _ in range(case.jobs):
        job = RecoveryJob(case, timeout_s)
        try:
            job.start()
            for _ in range(case.kills):
                found.append(job.kill())
                if case.compared:
                    control += job.control()
            documents.append(job.end())
        finally:
            job.close()
    row = summary(case, found, documents, control)
    if case.victim == "leader" and row["restarts"]:
        raise ContenderError(f"{case.name}: a backup had not caught up in time: {documents[0]['warnings']}")
    return row


def _cost(cost: Cost, pairs: int, timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """By name, what it costs, and why it is not known."""
    from bench_lib.runner import Runner
    from bench_lib.training import TrainingContender

    builders = {
        trainer.name: partial(TrainingContender, trainer, cost.workload, timeout_s)
        for trainer in (cost.without, cost.with_it)
    }
    outcome = Runner(builders, lambda _: None).run(pairs, WARMUPS)
    samples = [outcome.samples_s.get(trainer.name, []) for trainer in (cost.without, cost.with_it)]
    if outcome.failed or len(samples[0]) != len(samples[1]) or not samples[0]:
        return {}, {cost.name: "; ".join(outcome.failed.values()) or "a turn is missing"}
    steps = [[turn_s / cost.workload.steps for turn_s in turns] for turns in samples]
    return {cost.name: {"what": cost.what, "mode": cost.mode, "model": cost.workload.model, **paired(*steps)}}, {}


def _write(path: Path, facts: Machine, results: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    """Put the results into the file in one step; others in it stay."""
    document = {"recoveries": {}, "costs": {}, "failed": {}, **before(path, "recovery", SCHEMA)}
    done = {name for rows in results.values() for name in rows}
    document |= {
        **head("recovery", SCHEMA, facts),
        "failed": {name: why for name, why in {**document["failed"], **failed}.items() if name not in done},
    }
    for section, rows in results.items():
        merged = {**document[section], **rows}
        document[section] = {name: merged[name] for name in NAMES if name in merged}
    write_document(path, document)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", choices=NAMES, help="only these (see --list)")
    add("--quick", action="store_true", help="the small model, two kills each, and one cost")
    add("--kills", type=at_least_one, help="at most so many per case (default 5)")
    add("--pairs", type=at_least_one, help="of turns, to tell a cost (default 9)")
    add("--timeout", type=float, default=120.0, help="longest wait for anything, in seconds (default 120)")
    add("--json", type=writable, metavar="FILE", help="also write everything here; other results in it stay")
    add("--list", action="store_true", help="list what can be measured and stop")
    options = parser.parse_args(arguments)
    options.kills = options.kills or (2 if options.quick else 5)
    options.pairs = options.pairs or (5 if options.quick else 9)
    return options


if __name__ == "__main__":
    sys.exit(main())
