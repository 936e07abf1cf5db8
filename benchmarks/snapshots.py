"""What a checkpoint costs the training, and so checkpoints every 30 s: an MLP of 25 million parameters.

Turns of the same steps, in pairs: in one of each pair a checkpoint is asked for at its beginning, and written while the
workers train. The cost of a checkpoint is the difference; benchmarks/README.md says how it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.contender import ContenderError
from bench_lib.documents import before, head, write_document
from bench_lib.idle import STIME, UTIME, descendants
from bench_lib.training import Optimizer, Trainer, TrainingContender, Workload

SCHEMA = 1
INTERVAL_S = 30.0
TIMEOUT_S = 120.0
WAYS = {
    "downpour-1": Trainer("downpour-1", "ours", 1, ()),
    "downpour-async-2": Trainer("downpour-async-2", "ours", 2, ()),
    "downpour-sync-2": Trainer("downpour-sync-2", "ours", 2, ("--mode", "sync")),
}


@dataclass(frozen=True)
class Row:
    """One job. Seconds; of several turns, the median."""

    name: str
    optimizer: Optimizer
    file_bytes: int
    without_s: float
    """a turn"""
    differences_s: list[float]
    """of each pair: what its turn with a checkpoint took longer"""
    cost_s: float
    """their median, which may be below 0 where the noise is larger"""
    processor_s: float
    """the same of all processes' processor time, over the cores: less noise, and what counts where all are busy"""
    told_s: float
    """what the shards say that it costs: processor time over cores"""
    commit_s: float
    """from the wish to the commit"""

    @property
    def overhead(self) -> float:
        """Share of the throughput that checkpoints at :data:`INTERVAL_S` take."""
        return self.cost_s / INTERVAL_S


class Wisher:
    """Asks the job in the run directory ``run`` for a checkpoint and waits for it, beside a turn."""

    def __init__(self, run: str) -> None:
        from downpour.jobs.client import ClusterClient
        from downpour_deploy import running

        found = running.read(run)
        if found is None:
            raise ContenderError(f"no job runs in {run}")
        self._run, self._job = run, found.job
        self._client = ClusterClient(found.address, security="none")
        self.commits_s: list[float] = []
        self.told_s: list[float] = []
        self.file_bytes = 0

    def wish(self) -> threading.Thread:
        """A thread that ends with the commit."""
        thread = threading.Thread(target=self._wish)
        thread.start()
        return thread

    def close(self) -> None:
        self._client.close()

    def _wish(self) -> None:
        from downpour_coordinator import checkpoints
        from downpour_deploy.checkpoint.now import await_commit

        began_s = self._client.now()
        found = await_commit(self._client, self._job, TIMEOUT_S)
        if found["state"] == "committed":
            self.commits_s.append(self._client.now() - began_s)
            path = os.path.join(checkpoints.folder_of(self._run, found["number"]), checkpoints.MANIFEST)
            with open(path, encoding="utf-8") as file:
                files = json.load(file)["files"]
            self.told_s.append(sum(entry["cost_s"] for entry in files))
            self.file_bytes = sum(entry["bytes"] for entry in files)


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
            for name in options.only:
                rows.append(_row(WAYS[name], optimizer, options.pairs, options.steps))
                terminal.print(f"{optimizer}, {name} done", style="dim")
    except ContenderError as error:
        terminal.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        terminal.print("interrupted; everything that was started has ended")
        return 130
    terminal.print(_table(rows))
    if options.json is not None:
        document = {
            **head("snapshots", SCHEMA, facts),
            "settings": {"interval_s": INTERVAL_S, "pairs": options.pairs, "steps": options.steps},
            "results": _merged(options.json, [{**asdict(row), "overhead": row.overhead} for row in rows]),
        }
        write_document(options.json, document)
    return 0


def _merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows``, and those of other jobs that are in the file already."""
    there: list[dict[str, Any]] = before(path, "snapshots", SCHEMA).get("results", [])
    by_key = {(row["optimizer"], row["name"]): row for row in (*there, *rows)}
    return [by_key[key] for key in sorted(by_key, reverse=True)]


def _row(trainer: Trainer, optimizer: Optimizer, pairs: int, steps: int) -> Row:
    """Raises :class:`ContenderError`."""
    workload = Workload(f"mlp25m-{optimizer}", "mlp25m", optimizer, batch=64, steps=steps, warm=0)
    contender = TrainingContender(trainer, workload, TIMEOUT_S)
    try:
        contender.start()
        contender.run_once()
        wisher = Wisher(os.path.join(contender.programs.folder, "run"))
        try:
            without, differences, processor = [], [], []
            for pair in range(-1, pairs):
                taken: dict[bool, float] = {}
                used: dict[bool, float] = {}
                for wished in (True, False) if pair % 2 else (False, True):
                    before_s = _processor_s()
                    thread = wisher.wish() if wished else None
                    taken[wished] = contender.run_once()
                    if thread is not None:
                        thread.join()
                    used[wished] = _processor_s() - before_s
                if pair >= 0:  # the first checkpoint of a process also finds its memory
                    without.append(taken[False])
                    differences.append(taken[True] - taken[False])
                    processor.append(used[True] - used[False])
        finally:
            wisher.close()
    finally:
        contender.close()
    if len(wisher.commits_s) <= pairs:
        raise ContenderError(f"{trainer.name}: {pairs + 1 - len(wisher.commits_s)} checkpoints were not committed")
    return Row(
        name=trainer.name,
        optimizer=optimizer,
        file_bytes=wisher.file_bytes,
        without_s=statistics.median(without),
        differences_s=differences,
        cost_s=statistics.median(differences),
        processor_s=statistics.median(processor),
        told_s=statistics.median(wisher.told_s),
        commit_s=statistics.median(wisher.commits_s),
    )


def _processor_s() -> float:
    """That all processes below this one have taken, over the cores."""
    ticks = sum(int(fields[UTIME]) + int(fields[STIME]) for fields in descendants(os.getpid()).values())
    return ticks / os.sysconf("SC_CLK_TCK") / len(os.sched_getaffinity(0))


def _table(rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    title = f"Checkpoints of an MLP of 25 million parameters; the aim is 2 % at one every {INTERVAL_S:g} s"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("optimizer", "job"):
        table.add_column(heading)
    for heading in (
        "MB",
        "turn",
        "one costs",
        "in processor time",
        "its shards say",
        "until committed",
        f"every {INTERVAL_S:g} s",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.optimizer,
            row.name,
            f"{row.file_bytes / 1e6:.0f}",
            f"{row.without_s:.2f} s",
            f"{row.cost_s * 1e3:.0f} ms",
            f"{row.processor_s * 1e3:.0f} ms",
            f"{row.told_s * 1e3:.0f} ms",
            f"{row.commit_s:.2f} s",
            f"{row.overhead:.2%}",
        )
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"], help="default: both")
    add("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="only these jobs")
    add("--pairs", type=at_least_one, default=9, help="of turns, with a checkpoint and without (default 9)")
    add("--steps", type=at_least_one, default=24, help="in a turn (default 24)")
    add("--json", type=writable, metavar="FILE", help="also write everything here; other jobs in it stay")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
