"""Lines of ``spans.jsonl`` → spans on one clock. docs/tracing.md describes the lines.

Processes of one host have a clock in common; each has measured how far it is from the coordinator's, over and over, and
of all measurements of a host the one with the shortest round trip counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from downpour_common.errors import ConfigError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Span:
    """Times in nanoseconds since the trace began. ``step``: how many steps its worker had completed."""

    name: str
    begin_ns: int
    end_ns: int
    thread: int
    step: int
    facts: Mapping[str, int | float | str]


@dataclass(slots=True)
class Process:
    """A worker's process, and what it has told. ``sizes`` and ``moved`` are in bytes."""

    worker: int
    epoch: int
    host: str
    place: dict[str, Any]
    spans: list[Span] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    missing: int = 0
    """lines that should be there and are not"""

    @property
    def rank(self) -> int:
        """In its replica."""
        return int(self.place.get("rank", 0))

    @property
    def replica(self) -> int:
        """The number of its replica."""
        return int(self.place.get("replica", self.worker))

    @property
    def stage(self) -> int:
        """Of the pipeline."""
        return int(self.place.get("stage", 0))

    @property
    def stages(self) -> int:
        """Of the pipeline; 1: there is none."""
        return int(self.place.get("stages", 1))

    @property
    def name(self) -> str:
        """``worker/3 replica 1 stage 0 rank 1``, without what a job of single workers has not."""
        text = f"worker/{self.worker}" + (f" epoch {self.epoch}" if self.epoch else "")
        if int(self.place.get("ranks", 1)) == 1:
            return text
        return f"{text} replica {self.replica} stage {self.stage} rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Trace:
    """``unaligned``: hosts whose clock nobody has compared with the coordinator's, if there are several. ``damaged``:
    lines that could not be read."""

    job: str
    processes: tuple[Process, ...]
    unaligned: int
    damaged: int


def parse(lines: Iterable[str | bytes], place: str) -> Trace:
    """Read a trace. Raises :class:`ConfigError` if there is nothing in it; ``place`` says where it was."""
    damaged = 0
    batches: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        try:
            batch = json.loads(line)
            if batch["version"] != VERSION:
                raise ConfigError(f"{place}: was written by another version of downpour; read it with that one")
            _check(batch)
            batches.setdefault((*_process(batch), batch["number"]), batch)
        except (ValueError, TypeError, KeyError, IndexError):
            damaged += 1
    if not batches:
        raise ConfigError(f"{place}: holds no spans, {'only damaged lines' if damaged else 'not even one line'}")
    offsets = _offsets(batches.values())
    hosts = {batch["host"] for batch in batches.values()}
    processes: dict[tuple[Any, ...], Process] = {}
    numbers: dict[tuple[Any, ...], set[int]] = {}
    starts = [
        row[1] + offsets.get(batch["host"], 0)
        for batch in batches.values()
        if batch["host"] in offsets or not offsets
        for row in batch["spans"]
    ]
    origin = min(starts, default=0)
    for (*key, number), batch in sorted(batches.items()):
        found = processes.setdefault(
            tuple(key), Process(batch["worker"], batch["epoch"], batch["host"], dict(batch["place"]))
        )
        numbers.setdefault(tuple(key), set()).add(number)
        _add(found, batch, offsets.get(batch["host"], 0) - origin)
    for one, process in processes.items():
        process.missing = max(numbers[one]) + 1 - len(numbers[one])
        process.spans.sort(key=lambda span: (span.begin_ns, -span.end_ns))
    unaligned = len(hosts - offsets.keys()) if len(hosts) > 1 else 0
    if unaligned:
        _begin_together([p for p in processes.values() if p.host not in offsets])
    ordered = sorted(processes.values(), key=lambda p: (p.worker, p.epoch, p.spans[0].begin_ns if p.spans else 0))
    return Trace(next(iter(batches.values()))["job"], tuple(ordered), unaligned, damaged)


def _process(batch: dict[str, Any]) -> tuple[Any, ...]:
    """What no other process has: slots and epochs are used again when a run is resumed."""
    return batch["worker"], batch["epoch"], batch["host"], batch["born_ns"]


def _check(batch: dict[str, Any]) -> None:
    """Raises what :func:`parse` takes as damage."""
    whole = [batch[key] for key in ("worker", "epoch", "number", "born_ns", "dropped")]
    counts = [*batch["sizes"].values(), *batch["moved"].values()]
    clock = batch["clock"] or [0, 0]
    times = [n for row in batch["spans"] for n in row[1:5]]
    if not all(type(n) is int for n in [*whole, *counts, *clock, *times]) or len(clock) != 2:
        raise TypeError
    texts = [batch["job"], batch["host"], *(row[0] for row in batch["spans"])]
    if not all(type(text) is str for text in texts) or type(batch["place"]) is not dict:
        raise TypeError
    for row in batch["spans"]:
        if len(row) not in (5, 6) or type(row[5] if len(row) == 6 else {}) is not dict or row[2] < 0:
            raise TypeError


def _offsets(batches: Iterable[dict[str, Any]]) -> dict[str, int]:
    """By host: what is to be added to its clock's times."""
    best: dict[str, tuple[int, int]] = {}
    for batch in batches:
        if batch["clock"]:
            offset, round_trip = batch["clock"]
            best[batch["host"]] = min(best.get(batch["host"], (round_trip, offset)), (round_trip, offset))
    return {host: offset for host, (_, offset) in best.items()}


def _add(process: Process, batch: dict[str, Any], shift_ns: int) -> None:
    process.dropped = max(process.dropped, batch["dropped"])
    for known, news in ((process.sizes, batch["sizes"]), (process.moved, batch["moved"])):
        for key, value in news.items():
            known[key] = max(known.get(key, 0), value)
    for name, begin_ns, took_ns, thread, step, *facts in batch["spans"]:
        at = begin_ns + shift_ns
        process.spans.append(Span(name, at, at + took_ns, thread, step, facts[0] if facts else {}))


def _begin_together(processes: list[Process]) -> None:
    """Nothing is known of these hosts' clocks: each host's first span is put where the trace begins."""
    for host in {process.host for process in processes}:
        there = [process for process in processes if process.host == host]
        first = min((span.begin_ns for process in there for span in process.spans), default=0)
        for process in there:
            process.spans = [
                Span(s.name, s.begin_ns - first, s.end_ns - first, s.thread, s.step, s.facts) for s in process.spans
            ]
