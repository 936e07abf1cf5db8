"""Many jobs that go wrong in every way, in one thread and virtual time, each from its seed; see ``simulator``.

python tests/chaos/simulate.py --seeds 100000 --jobs 2
python tests/chaos/simulate.py --seed 4711 --trace
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from simulator.scenario import scenario
from simulator.shrink import shrink
from simulator.world import play


def main() -> int:
    """Exit code 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first one")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--mode", help="async, ssp:S or sync; else as the seed says")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--trace", action="store_true", help="with --seed: the event log")
    parser.add_argument("--faults", help="with --seed: numbers of the only faults to have, as in 0,2; - for none")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _one(arguments)
    return _many(arguments)


def _one(arguments: argparse.Namespace) -> int:
    chosen = scenario(arguments.seed, arguments.mode)
    if arguments.faults is not None:
        chosen = shrink.with_faults(chosen, arguments.faults)
    print(f"seed {arguments.seed}: {chosen.describe()}")
    outcome = play(chosen, tracing=arguments.trace)
    for line in outcome.log:
        print(line)
    print(
        f"{outcome.state} {outcome.reason} after {outcome.seconds_s:.2f} virtual s, {outcome.arrivals} messages, "
        f"{outcome.restarts} restarts, {outcome.faults} faults"
    )
    if outcome.violation:
        print(f"VIOLATED: {outcome.violation}")
    return int(bool(outcome.violation))


def _many(arguments: argparse.Namespace) -> int:
    started_s = time.monotonic()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    failures = done = 0
    ways = [(seed, arguments.mode) for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, _quiet) as pool:
        for seed, violation in pool.imap_unordered(_try, ways, chunksize=20):
            done += 1
            if not violation:
                continue
            failures += 1
            print(f"seed {seed}: {violation[:600]}", flush=True)
            if not arguments.keep_going:
                pool.terminate()
                print(shrink.report(seed, arguments.mode), flush=True)
                break
    took_s = time.monotonic() - started_s
    print(f"{done} seeds in {took_s:.1f} s ({done / took_s:.0f}/s), {failures} violated an invariant")
    return int(bool(failures))


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()


def _try(way: tuple[int, str | None]) -> tuple[int, str]:
    seed, mode = way
    try:
        return seed, play(scenario(seed, mode)).violation
    except Exception as error:
        return seed, f"the simulator itself failed: {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
