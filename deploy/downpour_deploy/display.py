"""What the user sees: the choices made, the processes' output, progress, and the closing report."""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from downpour_common.replicas import counted, is_lead
from downpour_common.sizes import format_bytes
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.losses import late_in_words
from downpour_coordinator.measures import quantiles
from downpour_coordinator.outcome import Outcome
from downpour_coordinator.phases import Phase
from downpour_deploy.figures import measure_rows
from downpour_deploy.resolve import ResolvedJob

STATUS_S = 10.0
"""Time between status lines where there is no terminal."""
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


class Display:
    """Writes to ``stream`` (stderr under ``--json``, so that stdout holds one object and nothing else)."""

    def __init__(self, json_output: bool, quiet: bool) -> None:
        self._json, self._quiet = json_output, quiet
        stream: TextIO = sys.stderr if json_output else sys.stdout
        self._console = Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
        self._live: Live | None = None
        self._last_status_s = time.monotonic()
        self._last_samples = (time.monotonic(), 0)
        self._rate = 0.0
        if self._console.is_terminal and not quiet:
            self._live = Live(Text(""), console=self._console, refresh_per_second=4, transient=True)

    def start(self, job: ResolvedJob) -> None:
        """Say what was chosen."""
        spec = job.spec
        if not self._quiet:
            self._console.print(
                f"downpour: job {spec.name}: {counted(spec.workers, spec.ranks)}, {_n(spec.shards, 'shard')}"
                f"{', each with a backup' if spec.replication > 1 else ''}, "
                f"mode {spec.mode}, {_threads(job)} ({_n(job.cores, 'core')}), "
                f"{spec.settings.transport}, chunks of {format_bytes(spec.settings.chunk_bytes)}, seed {spec.seed}, "
                f"out {spec.out}",
                markup=False,
            )
            if spec.resume:
                clock = job.checkpoint.manifest["clock"] if job.checkpoint else 0
                self._console.print(f"downpour: going on from {spec.resume}, clock {clock}", markup=False)
        for note in job.notes:
            self.note(note)
        if self._live is not None:
            self._live.start()

    def line(self, role: str, index: int, text: str, name: str = "") -> None:
        """A line of a process' output; ``name``: what it is called, if not by role and index."""
        colour = _COLOURS[index % len(_COLOURS)] if role == "worker" else "white"
        self._console.print(Text.assemble((f"{name or f'{role}/{index}'} ", colour), Text.from_ansi(text)))

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._console.print(Text(f"downpour: {text}", "yellow"))

    def progress(self, job: Lifecycle, now_s: float) -> None:
        """Called a few times per second."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(Text(self._status(job, now_s), "bold"))
        elif now_s - self._last_status_s >= STATUS_S:
            self._last_status_s = now_s
            status = self._status(job, now_s)
            self._console.print(f"downpour: {status}", markup=False)

    def _status(self, job: Lifecycle, now_s: float) -> str:
        state = job.training
        if job.phase in (Phase.STARTING, Phase.WAITING) or not state.begun:
            names = ", ".join(job.waiting_for()) or "the processes to end"
            return f"waiting for {names} ({job.waited_s(now_s):.0f} s)"
        progress = (w.progress for w in state.workers.values() if is_lead(w.slot, job.spec.ranks))
        reports = [p for p in progress if p is not None]
        samples = sum(p.samples for p in reports)
        before_s, before = self._last_samples
        if now_s - before_s >= 1.0:
            self._rate = (samples - before) / (now_s - before_s)
            self._last_samples = (now_s, samples)
        parts = [
            f"step {max((p.clock for p in reports), default=0)}",
            f"epoch {min((p.epoch for p in reports), default=0)}",
            f"{self._rate:,.0f} samples/s",
        ]
        parts += [f"{name} {value:.4g}" for name, value in list(state.latest.items())[:3]]
        stale = quantiles(state.staleness())
        if stale:
            parts.append(f"staleness {stale['p50']}/{stale['p99']}/{stale['max']}")
        if job.degraded:
            parts.append(f"DEGRADED: {job.degraded}")
        return "  ".join(parts)

    def stop(self) -> None:
        """No more progress."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(self, outcome: Outcome) -> None:
        """The closing report."""
        self.stop()
        if outcome.failure is not None:
            self._failure(outcome)
        for warning in outcome.warnings:
            self.note(warning)
        if self._json:
            sys.stdout.write(json.dumps(outcome.document()) + "\n")
            sys.stdout.flush()
        self._console.print(_table(outcome))

    def _failure(self, outcome: Outcome) -> None:
        failure = outcome.failure
        assert failure is not None
        who = failure.who or failure.role
        self._console.print(Text.assemble((f"{who} failed: ", "bold red"), (failure.message, "bold")))
        for line in failure.details.splitlines():
            self._console.print(Text(f"    {line}"))


def _table(outcome: Outcome) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    state = Text(outcome.state, "green" if outcome.state == "SUCCEEDED" else "red")
    table.add_row("job", Text.assemble(outcome.job, "  ", state))
    for name, value in outcome.metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.5g} (last logged)")
    if outcome.steps:
        table.add_row("steps", f"{outcome.steps:,} per worker at most, {outcome.samples:,} samples")
        rate = f"{outcome.samples_per_s:,.0f} samples/s" if outcome.samples else f"{outcome.steps_per_s:,.1f} steps/s"
        rate += f" over {outcome.train_s:.1f} s"
        table.add_row("throughput", f"{rate}, {outcome.wait_share:.0%} of it waiting")
        table.add_row(
            "moved",
            f"{outcome.bytes_moved / 1e6:,.1f} MB in {outcome.pushes:,} pushes, {outcome.pulls:,} pulls",
        )
    if outcome.ranks > 1:
        table.add_row("workers", counted(outcome.replicas * outcome.ranks, outcome.ranks))
    if outcome.restarts:
        table.add_row("restarts", str(outcome.restarts))
    if outcome.lost_pushes:
        table.add_row("lost", f"{outcome.lost_pushes:,} of the pushes, with shards that died")
    if outcome.uncompensated:
        table.add_row("compensation", f"{outcome.uncompensated:,} contributions to chunks were applied without it")
    if outcome.late:
        table.add_row("late", late_in_words(outcome.late))
    if outcome.steps:
        for name, text in measure_rows(outcome.document(), by_worker=outcome.ranks == 1 < outcome.replicas):
            table.add_row(name, text)
    table.add_row(
        "time",
        f"{outcome.wall_s:.1f} s" + (f", first step after {outcome.start_s:.1f} s" if outcome.start_s else ""),
    )
    if outcome.model:
        table.add_row("weights", outcome.model)
    table.add_row("run", outcome.out)
    return table


def _threads(job: ResolvedJob) -> str:
    workers, shards = job.threads.workers, job.threads.shards
    if workers == shards:
        return f"{_n(workers, 'thread')} per process"
    return f"{_n(workers, 'thread')} per worker and {shards} per shard"


def _n(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
