"""Prints what the recovery benchmark has found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Rows = Mapping[str, Mapping[str, Any]]


def show(results: Mapping[str, Rows], terminal: Console) -> None:
    """Both tables, as far as there is something in them."""
    if results["recoveries"]:
        terminal.print(_recoveries(results["recoveries"]))
    if results["costs"]:
        terminal.print(_costs(results["costs"]))


def _recoveries(rows: Rows) -> Table:
    table = _table("After a kill; seconds: median (longest)", "killed, mode, model", "kills", "gap", "back after")
    for heading in (
        "replacement trains after",
        "the other's steps: p50",
        "p99",
        "÷ before: p50",
        "p99",
        "÷ control: p99",
        "lost pushes",
    ):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [_spread(row, "gap_s"), _spread(row, "back_s"), _spread(row, "trains_s") if "trains_s" in row else ""]
        if "steps_ratio" in row:
            cells += [f"{1e3 * row['steps_during_s'][at]:.2f} ms" for at in ("p50", "p99")]
            cells += [f"{row['steps_ratio'][at]:.2f}" for at in ("p50", "p99")]
            cells += [f"{row['steps_ratio_to_control']['p99']:.2f}"]
        else:
            cells += [""] * 5
        table.add_row(name, str(row["kills"]), *cells, str(row["lost_pushes"]))
    return table


def _costs(rows: Rows) -> Table:
    table = _table("What being ready costs", "what, mode, model", "step without", "with", "ratio", "of the pairs")
    for name, row in rows.items():
        steps = (f"{1e3 * row[key]:.2f} ms" for key in ("without_s", "with_s"))
        pairs = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        table.add_row(name, *steps, f"{row['ratio']:.3f}", pairs)
    return table


def _spread(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'max_{name}']:.2f})"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
