"""Turns samples into the numbers that are reported, and writes them as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_lib.contender import Entry, Group
from bench_lib.contenders import REFERENCE
from bench_lib.documents import write_document
from bench_lib.machine import ONE_THREAD, Machine
from bench_lib.runner import Outcome

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    payload_bytes: int
    runs: int
    warmups: int


@dataclass(frozen=True)
class Result:
    """One contender's numbers. Goodput is `counted_bytes` over the median time."""

    name: str
    group: Group
    counted_what: str
    counted_bytes: int
    samples_s: list[float]
    median_s: float
    min_s: float
    max_s: float
    goodput_gb_per_s: float


@dataclass(frozen=True)
class Results:
    """Everything that a benchmark found out."""

    date: str  # UTC, ISO 8601
    machine: Machine
    settings: Settings
    results: list[Result]
    goodput_ratios: dict[str, dict[str, float]]  # [a][b]: a's goodput over b's
    idle_load: float  # cores used by idle contenders, all together
    failed: dict[str, str]
    skipped: dict[str, str]  # by contender: what it lacks


def conclude(entries: list[Entry], settings: Settings, machine: Machine, outcome: Outcome) -> Results:
    samples_s = outcome.samples_s
    results = [
        _result(entry, settings.payload_bytes, samples_s[entry.name]) for entry in entries if entry.name in samples_s
    ]
    goodputs = {result.name: result.goodput_gb_per_s for result in results}
    return Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        settings=settings,
        results=results,
        goodput_ratios={a: {b: goodputs[a] / goodputs[b] for b in goodputs} for a in goodputs},
        idle_load=outcome.idle_load,
        failed=outcome.failed,
        skipped=outcome.skipped,
    )


def _result(entry: Entry, payload_bytes: int, samples_s: list[float]) -> Result:
    median_s = statistics.median(samples_s)
    counted_bytes = entry.counted * payload_bytes
    return Result(
        name=entry.name,
        group=entry.group,
        counted_what=entry.counted_what,
        counted_bytes=counted_bytes,
        samples_s=samples_s,
        median_s=median_s,
        min_s=min(samples_s),
        max_s=max(samples_s),
        goodput_gb_per_s=counted_bytes / median_s / 1e9,
    )


def write_json(results: Results, path: Path) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "pushpull",
        "reference": REFERENCE,
        "child_environment": ONE_THREAD,
        **asdict(results),
    }
    write_document(path, document)
