"""What fetching layer by layer saves and costs: a model three times its budget beside one that is here as a whole.

A worker's peak beyond what torch takes, the weights and gradients that it held at most as it counts them itself, the
bytes that it moved per step, and the time of a step; for each number of workers and batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.contender import MB, ContenderError
from bench_lib.documents import head, write_document

SCHEMA = 1
SCRIPT = Path(__file__).parent / "scripts" / "layers.py"
WIDTH, DEPTH = 1024, 24
MODEL_BYTES = DEPTH * (WIDTH + 1) * WIDTH * 4
BUDGET_BYTES = MODEL_BYTES // 3
TIMEOUT_S = 180.0
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "whole, memory": ("fetch=whole",),
    "whole, sent": ("fetch=whole", "shared_memory=false"),
    "layers": ("fetch=layers", f"memory={BUDGET_BYTES}"),
    "layers, least": ("fetch=layers",),
}


@dataclass(frozen=True)
class Row:
    """One job. Bytes; of its first worker."""

    way: str
    workers: int
    batch: int
    step_s: float
    """the median one"""
    peak: int
    """resident at most, beyond what torch took before there was a model; shared memory included"""
    held: int
    """weights and gradients at most, as the worker counts them; 0: it does not"""
    budget: int
    moved: int
    """sent and received per step"""

    @property
    def passed(self) -> bool:
        """Whether the budget was kept."""
        return self.held <= self.budget


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    facts = machine.look()
    rows: list[Row] = []
    try:
        for workers in options.workers:
            for batch in options.batches:
                for way in WAYS:
                    if way == "plain" and workers > 1:
                        continue
                    rows.append(_row(way, workers, batch, options.steps))
                    terminal.print(f"{way}, {workers} × {batch} done", style="dim")
    except ContenderError as error:
        terminal.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    terminal.print(_table(rows))
    if options.json is not None:
        settings = {"model_bytes": MODEL_BYTES, "width": WIDTH, "depth": DEPTH, "steps": options.steps}
        results = [{**asdict(row), "passed": row.passed} for row in rows]
        write_document(options.json, {**head("layerwise", SCHEMA, facts), "settings": settings, "results": results})
    return 0


def _row(way: str, workers: int, batch: int, steps: int) -> Row:
    """Raises :class:`ContenderError`."""
    with tempfile.TemporaryDirectory(prefix="downpour-layers-") as folder:
        report, run = Path(folder) / "report.json", Path(folder) / "run"
        script = [str(SCRIPT), "--width", str(WIDTH), "--depth", str(DEPTH), "--batch", str(batch)]
        script += ["--steps", str(steps), "--report", str(report), *(["--meta"] if way.startswith("layers") else [])]
        command = [sys.executable, *script]
        if WAYS[way]:
            settings = [word for setting in WAYS[way] for word in ("--set", setting)]
            job = ["run", "-q", "-w", str(workers), "-s", "1", "--mode", "sync", "--out", str(run), *settings]
            command = [sys.executable, "-m", "downpour_deploy", *job, *script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ContenderError(f"{way}: not done after {TIMEOUT_S:g} s") from None
        if done.returncode:
            raise ContenderError(f"{way}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        found = json.loads(report.read_text(encoding="utf-8"))
        figures = _figures(run / "metrics.jsonl") if way.startswith("layers") else {}
        return Row(
            way=way,
            workers=workers,
            batch=batch,
            step_s=found["step_s"],
            peak=found["peak"] - found["before"],
            held=int(figures.get("layers_peak_bytes", 0)),
            budget=int(figures.get("layers_budget_bytes", 0)),
            moved=int(figures.get("layers_moved_bytes", 0) / (steps + 2)),
        )


def _figures(metrics: Path) -> dict[str, float]:
    """What worker 0 has said of itself at its end."""
    found: dict[str, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("worker", row.get("slot")) == 0:
            found |= {k: v for k, v in row.items() if k.startswith("layers_")}
    return found


def _table(rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    title = f"Layer by layer; the model has {MODEL_BYTES / MB:.0f} MB"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("way")
    for heading in ("workers", "batch", "step, ms", "peak, MB", "held, MB", "budget, MB", "moved per step, MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = [f"{size / MB:.0f}" if size else "" for size in (row.peak, row.held, row.budget, row.moved)]
        table.add_row(row.way, str(row.workers), str(row.batch), f"{row.step_s * 1e3:.0f}", *sizes)
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--workers", nargs="+", type=at_least_one, default=[1, 2], help="default 1 2")
    add("--batches", nargs="+", type=at_least_one, default=[64, 512], help="default 64 512")
    add("--steps", type=at_least_one, default=8, help="timed ones of each worker (default 8)")
    add("--json", type=writable, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
