"""Peak memory of a worker beside the plain script, and of a shard, for a model of 100 MB: is it what was promised?

A worker may take weights + gradients + one window of chunks more than the plain script; a shard weights + optimizer
state + one round buffer for each open contribution + 200 MB. benchmarks/README.md says how it is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Set
from dataclasses import asdict, dataclass
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.contender import MB, ContenderError
from bench_lib.documents import head, write_document
from bench_lib.peaks import Peak, Watch
from bench_lib.training import Optimizer, Trainer, TrainingContender, Workload
from downpour_common.config import Settings

SCHEMA = 1
MODEL_BYTES = 6 * (2048 * 2048 + 2048) * 4  # of scripts/train.py's mlp25m
STATES: dict[Optimizer, int] = {"sgd": 0, "adam": 2}  # optimizer state, in models
SHARD_SPARE_BYTES = 200 * MB
TIMEOUT_S = 120.0
WAYS: dict[str, tuple[str, ...]] = {"memory": (), "tcp": ("--set", "transport=tcp")}


@dataclass(frozen=True)
class Row:
    """One job. Bytes; of several workers, the one that took most."""

    optimizer: Optimizer
    way: str
    workers: int
    mode: str
    plain: int
    """peak of the plain script"""
    worker: int
    worker_limit: int
    shard: int
    """to its end, so with the snapshot that the job's result is made from"""
    shard_resident: int
    """the same with library pages and the workers' memory"""
    shard_training: int
    """until the last step"""
    shard_limit: int

    @property
    def passed(self) -> tuple[bool, bool]:
        """Worker, shard."""
        return self.worker <= self.worker_limit, self.shard <= self.shard_limit


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    options = _parse(arguments)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    facts = machine.look()
    rows: list[Row] = []
    try:
        for optimizer in options.optimizers:
            plain, _, _ = _peaks(Trainer("plain", "limit", 1), optimizer, options.steps)
            for way in WAYS:
                for workers, mode in ((1, "async"), (2, "async"), (2, "sync")):
                    rows.append(_row(optimizer, way, workers, mode, plain.resident, options.steps))
                    terminal.print(f"{optimizer}, {way}, {workers} × {mode} done", style="dim")
    except ContenderError as error:
        terminal.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    terminal.print(_table(rows))
    if options.json is not None:
        document = {
            **head("memory", SCHEMA, facts),
            "settings": {"model_bytes": MODEL_BYTES, "steps": options.steps},
            "results": [{**asdict(r), "worker_passed": r.passed[0], "shard_passed": r.passed[1]} for r in rows],
        }
        write_document(options.json, document)
    return 0


def _row(optimizer: Optimizer, way: str, workers: int, mode: str, plain: int, steps: int) -> Row:
    trainer = Trainer(f"{way}-{mode}-{workers}", "ours", workers, ("--mode", mode, *WAYS[way]))
    worker, training, shard = _peaks(trainer, optimizer, steps)
    window: int = Settings.model_fields["window_bytes"].default
    return Row(
        optimizer=optimizer,
        way=way,
        workers=workers,
        mode=mode,
        plain=plain,
        worker=worker.resident,
        worker_limit=plain + 2 * MODEL_BYTES + window,
        shard=shard.own,
        shard_resident=shard.resident,
        shard_training=training.own,
        shard_limit=(1 + STATES[optimizer] + workers) * MODEL_BYTES + SHARD_SPARE_BYTES,
    )


def _peaks(trainer: Trainer, optimizer: Optimizer, steps: int) -> tuple[Peak, Peak, Peak]:
    """Of a worker (or the plain script), of the shard until the last step, and of the shard to its end.

    Raises :class:`ContenderError`.
    """
    workload = Workload(f"mlp25m-{optimizer}", "mlp25m", optimizer, batch=64, steps=steps, warm=0)
    contender = TrainingContender(trainer, workload, TIMEOUT_S)
    programs = contender.programs
    with Watch(lambda: programs.pids) as watch:
        try:
            contender.start()
            launchers, workers = set(programs.pids), set(programs.gate.pids.values())
            contender.run_once()
            training = _largest(watch, watch.peaks.keys() - launchers - workers)
        finally:
            contender.close()
    shards = watch.peaks.keys() - launchers - workers
    return _largest(watch, workers), training, _largest(watch, shards)


def _largest(watch: Watch, pids: Set[int]) -> Peak:
    peaks = [watch.peaks[pid] for pid in pids if pid in watch.peaks]
    return Peak(max((p.resident for p in peaks), default=0), max((p.own for p in peaks), default=0))


def _table(rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    title = f"Peak memory in MB; the model has {MODEL_BYTES / MB:.0f}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("optimizer", "way", "workers"):
        table.add_column(heading)
    for heading in ("plain", "worker", "at most", "", "shard, training", "to the end", "at most", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        verdicts = ["kept" if passed else "[bold red]not kept[/]" for passed in row.passed]
        table.add_row(
            row.optimizer,
            row.way,
            f"{row.workers} {row.mode}",
            *(f"{size / MB:.0f}" for size in (row.plain, row.worker, row.worker_limit)),
            verdicts[0],
            *(f"{size / MB:.0f}" for size in (row.shard_training, row.shard, row.shard_limit)),
            verdicts[1],
        )
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=list(STATES), default=list(STATES), help="default: both")
    add("--steps", type=at_least_one, default=8, help="of each worker (default 8)")
    add("--json", type=writable, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
