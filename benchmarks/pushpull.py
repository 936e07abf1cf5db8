"""How fast are N MB of fp32 pushed and pulled between two processes, and how far is that from the limits?

`python benchmarks/pushpull.py --help`; benchmarks/README.md says what is measured and what is counted.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from bench_lib.arguments import at_least_one, at_least_zero, writable
from bench_lib.contender import Entry, Spec
from bench_lib.contenders import registry


def main(arguments: list[str] | None = None) -> int:
    entries = registry()
    options = _parse(arguments, [entry.name for entry in entries])
    if options.list:
        _list(entries)
        return 0
    if options.only:
        entries = [entry for entry in entries if entry.name in options.only]
    return _measure(entries, options)


def _measure(entries: list[Entry], options: argparse.Namespace) -> int:
    from bench_lib import machine

    machine.use_one_thread()  # before anything heavy is imported, here or in a child
    from bench_lib import results
    from bench_lib.report import Report
    from bench_lib.runner import Runner

    report = Report()
    spec = Spec.of_mb(options.mb)
    facts = machine.look()
    try:
        builders = {entry.name: partial(entry.build, entry.name, spec) for entry in entries}
        outcome = Runner(builders, report.say).run(options.runs, options.warmup)
    except KeyboardInterrupt:
        report.say("interrupted; everything that was started has ended")
        return 130
    settings = results.Settings(spec.payload_bytes, options.runs, options.warmup)
    found = results.conclude(entries, settings, facts, outcome)
    report.show(found)
    if options.json is not None:
        results.write_json(found, options.json)
        report.say(f"written: {options.json}")
    return 1 if found.failed else 0


def _parse(arguments: list[str] | None, names: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--mb", type=at_least_one, default=100, help="payload one way, in 10^6 bytes (default 100)")
    add("--runs", type=at_least_one, default=7, help="timed runs per contender (default 7)")
    add("--warmup", type=at_least_zero, default=2, help="runs before those, not counted (default 2)")
    add("--only", nargs="+", metavar="NAME", choices=names, help="only these contenders (see --list)")
    add("--json", type=writable, metavar="FILE", help="also write all samples, medians and ratios here")
    add("--list", action="store_true", help="list the contenders and stop")
    return parser.parse_args(arguments)


def _list(entries: list[Entry]) -> None:
    for entry in entries:
        print(f"{entry.name:<16}{entry.group:<7}counts {entry.counted_what}")


if __name__ == "__main__":
    sys.exit(main())
