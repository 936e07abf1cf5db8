"""The command line of ``profile.py``, and its tables."""

from __future__ import annotations

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from bench_lib.arguments import at_least_one, at_least_zero, writable
from bench_lib.contender import ContenderError
from bench_lib.step_profile import Profile, Side, Wanted, run, write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the job and show its profile; an exit code."""
    options = _parse(arguments)
    console = Console(highlight=False)
    wanted = Wanted(
        options.model,
        options.optimizer,
        options.mode,
        options.workers,
        options.shards,
        tuple(options.settings),
        options.steps or (1000 if options.model == "digits" else 30),
        options.warmup,
    )
    try:
        profile = run(wanted, options.timeout)
    except ContenderError as error:
        console.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has ended")
        return 130
    show(profile, console)
    if options.json is not None:
        write_json(profile, options.json)
        console.print(f"written: {options.json}", style="dim", markup=False)
    return 0


def show(profile: Profile, console: Console) -> None:
    """A table per process."""
    wanted, machine = profile.wanted, profile.machine
    console.print(
        f"{wanted.model}, {wanted.optimizer}, {wanted.mode}, workers {wanted.workers}, shards {wanted.shards}"
        f"{''.join(f', {setting}' for setting in wanted.settings)}; {machine.cpu_model}, {machine.cores} cores, "
        f"load before {machine.load_average_1min:.2f}\n"
        f"Medians of {wanted.steps} steps; a step takes worker 0 {1e3 * profile.step_s:.2f} ms, timing included. "
        "busy: on the processor.",
        markup=False,
    )
    for side in profile.sides:
        console.print(_table(side, profile.step_s))
    for name in profile.missing:
        console.print(f"not timed, because there is no such function: {name}", style="bold red", markup=False)


def _table(side: Side, step_s: float) -> Table:
    table = Table(title=f"{side.side}/{side.rank}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("phase, its own time", no_wrap=True)
    for heading in ("ms", "%", "busy ms", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    thread = ""
    for phase in side.phases:
        if phase.thread != thread:
            thread = phase.thread
            table.add_section()
            table.add_row(f"thread {thread}")
        share = f"{100 * phase.wall_s / step_s:.0f}"
        table.add_row(phase.name, f"{1e3 * phase.wall_s:.2f}", share, f"{1e3 * phase.cpu_s:.2f}", f"{phase.calls:g}")
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="profile.py", description="Where the time of a training step goes: worker's and shard's side."
    )
    add = parser.add_argument
    add("--model", choices=("mlp25m", "digits", "tiny"), default="mlp25m", help="default mlp25m")
    add("--optimizer", choices=("sgd", "adam", "adam-fused"), default="sgd", help="default sgd")
    add("--mode", default="async", help="as for downpour run (default async)")
    add("-w", "--workers", type=at_least_one, default=1, help="default 1")
    add("-s", "--shards", type=at_least_one, default=1, help="default 1")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as for downpour run")
    add("--steps", type=at_least_one, help="steps that count (default 30; digits: 1000)")
    add("--warmup", type=at_least_zero, default=5, help="steps before those (default 5)")
    add("--timeout", type=float, default=300.0, help="seconds until the job is given up (default 300)")
    add("--json", type=writable, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)
