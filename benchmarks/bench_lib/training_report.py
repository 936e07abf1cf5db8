"""The training benchmark's tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from bench_lib.report import IDLE_LIMIT
from bench_lib.training_results import Section

REFERENCES = ("plain", "ddp-gloo")


def show(section: Section, console: Console) -> None:
    """Print one workload's results."""
    workload, machine = section.workload, section.machine
    console.print(
        f"\n{workload.name}: {section.rounds} turns of {workload.steps} steps per worker, {workload.batch} samples "
        f"each; {machine.cpu_model}, {machine.cores} cores, load before {machine.load_average_1min:.2f}, "
        f"torch {machine.torch}"
    )
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("contender", no_wrap=True)
    for heading in ("workers", "step ms", "min", "max", "samples/s", *(f"÷ {name}" for name in REFERENCES)):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in section.results:
        ratios = [section.ratios[result.name].get(name) for name in REFERENCES]
        table.add_row(
            result.name,
            str(result.workers),
            *(f"{s * 1000:.2f}" for s in (result.step_s, result.min_step_s, result.max_step_s)),
            f"{result.samples_per_s:.0f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    console.print(table)
    for reached in section.aims:
        aim = reached.aim
        what = {"samples": "samples/s ÷", "step": "step ÷", "ms": "step in ms"}[aim.quantity]
        sign = "≥" if aim.at_least else "≤"
        verdict = "reached" if reached.passed else "not reached"
        line = f"{aim.contender}: {what} {aim.reference} = {reached.measured:.2f}, aim {sign} {aim.limit:g}: {verdict}"
        console.print(line, style="green" if reached.passed else "red", markup=False)
    console.print(f"Processor used while all were idle: {section.idle_load:.2f} cores.")
    if section.idle_load > IDLE_LIMIT:
        console.print("Idle contenders are not idle: the times above are disturbed.", style="bold red")
    for name, reason in section.failed.items():
        console.print(f"{name} failed: {reason.splitlines()[0]}", style="bold red", markup=False)
