"""Prints results as tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from bench_lib.contenders import REFERENCE
from bench_lib.results import Result, Results

WIDTH = 160  # columns
IDLE_LIMIT = 0.05  # cores; more than this and the idle contenders disturb the one that is timed


def console() -> Console:
    """The terminal; where there is none, wide enough for the tables."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


class Report:
    """Writes to the terminal, or plainly to a file or pipe."""

    def __init__(self) -> None:
        self._console = console()

    def say(self, line: str) -> None:
        self._console.print(line, style="dim", markup=False)

    def show(self, results: Results) -> None:
        self._heading(results)
        self._console.print(_main_table(results))
        compared = [result for result in results.results if result.group != "limit"]
        if len(compared) > 1:
            self._console.print(_ratio_table(results, compared))
        self._console.print(f"Processor used while all were idle: {results.idle_load:.2f} cores.")
        if results.idle_load > IDLE_LIMIT:
            self._warn("Idle contenders are not idle: the times above are disturbed.")
        for name, reason in results.skipped.items():
            self.say(f"{name} skipped: {reason}")
        for name, reason in results.failed.items():
            self._warn(f"{name} failed: {reason.splitlines()[0]}")  # all of it was said when it happened

    def _heading(self, results: Results) -> None:
        machine, settings = results.machine, results.settings
        self._console.print(
            f"{results.date}, {machine.cpu_model}, {machine.cores} cores, "
            f"load before {machine.load_average_1min:.2f}\n"
            f"Python {machine.python}, torch {machine.torch}, libzmq {machine.libzmq}\n"
            f"Payload {settings.payload_bytes / 1e6:.0f} MB of fp32 one way; {settings.runs} runs after "
            f"{settings.warmups} warm-ups; one thread per process (OMP, torch).\n"
            f"GB/s: counted bytes / median time; the last column says how often the payload counts; "
            f"1 GB = 10^9 bytes."
        )

    def _warn(self, line: str) -> None:
        self._console.print(line, style="bold red", markup=False)


def _main_table(results: Results) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("contender", no_wrap=True)
    for heading in ("median ms", "min", "max", "GB/s", f"÷ {REFERENCE}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("counts", no_wrap=True)
    group = ""
    for result in results.results:
        if group not in ("", result.group):
            table.add_section()
        group = result.group
        ratio = results.goodput_ratios[result.name].get(REFERENCE)
        table.add_row(
            result.name,
            *(f"{seconds * 1000:.1f}" for seconds in (result.median_s, result.min_s, result.max_s)),
            f"{result.goodput_gb_per_s:.2f}",
            "-" if ratio is None else f"{ratio:.2f}",
            result.counted_what,
        )
    return table


def _ratio_table(results: Results, compared: list[Result]) -> Table:
    """Those that push and pull, each against each."""
    table = Table(title="GB/s of the row ÷ GB/s of the column", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for column in compared:
        table.add_column(column.name, justify="right", no_wrap=True)
    for row in compared:
        ratios = results.goodput_ratios[row.name]
        table.add_row(row.name, *(f"{ratios[column.name]:.2f}" for column in compared))
    return table
