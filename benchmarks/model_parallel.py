"""Replicas of several workers: how full their pipelines are, what each rank holds, moves and keeps, how long steps are.

Real jobs of ``downpour run``, most of them with ``--trace``; benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from bench_lib import model_parallel as measured
from bench_lib.arguments import at_least_one, writable
from bench_lib.contender import ContenderError
from bench_lib.documents import before, head, write_document

SCHEMA = 1
SECTIONS = ("utilisation", "memory", "parts", "steps", "weights")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code: 1 as well if an aim was missed."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    say = partial(terminal.print, style="dim", markup=False)
    make: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "utilisation": partial(measured.utilisation, options.timeout, say),
        "memory": partial(measured.memory, options.timeout, say),
        "parts": partial(measured.parts, options.timeout, say),
        "steps": partial(measured.steps, options.rounds, options.timeout, say),
        "weights": measured.weights,
    }
    problems = []
    try:
        for name in options.only or SECTIONS:
            facts = machine.look()
            try:
                rows = make[name]()
            except ContenderError as error:
                terminal.print(str(error), style="bold red", markup=False)
                problems.append(f"{name} failed")
                continue
            stamp = head("model_parallel", SCHEMA, facts)
            section: dict[str, Any] = {"date": stamp["date"], "machine": stamp["machine"], "rows": rows}
            if name == "memory":
                section["grows"] = {schedule: measured.grows(rows, schedule) for schedule in ("gpipe", "1f1b")}
                if section["grows"]["1f1b"] > measured.AIM_FLAT:
                    problems.append(f"memory: 1F1B keeps {section['grows']['1f1b']:.2f} times as much")
            problems += [f"{name}: {row} misses its aim" for row in rows if not row.get("met", True)]
            if options.json is not None:
                found = before(options.json, "model_parallel", SCHEMA).get("sections", {}) | {name: section}
                ordered = {each: found[each] for each in SECTIONS if each in found}
                write_document(options.json, {**stamp, "sections": ordered})
            terminal.print(f"{name} done", style="dim")
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    for problem in problems:
        terminal.print(problem, style="bold red", markup=False)
    return int(bool(problems))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, help="only these")
    add("--rounds", type=at_least_one, default=7, help="turns for each time of a step (default 7)")
    add("--timeout", type=float, default=120.0, help="longest wait for a job, in seconds (default 120)")
    add("--json", type=writable, metavar="FILE", help="also write everything here; other sections in it stay")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
