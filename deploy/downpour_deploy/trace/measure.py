"""Spans → what a job spent its time on, and how well its pipelines were filled. Pure functions.

*Utilisation* of a replica's pipeline is busy area over total area: of each step, from the first beginning of a forward
or backward to the last end on any rank, times the ranks; busy is what of it the ranks spend in forward and backward.
With ``m`` micro-batches and ``p`` stages of equal cost, GPipe and 1F1B reach m / (m + p - 1) (Huang et al. 2019;
Narayanan et al. 2019); with ``v`` stages on each rank, interleaved, m / (m + (p - 1) / v) (Narayanan et al. 2021).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from downpour_common.errors import ConfigError
from downpour_common.spans import BETWEEN, BUSY
from downpour_deploy.trace.read import Process, Span, Trace

WARM_UP = 2
"""First steps of a process that do not count for utilisation, if there are enough others."""

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Replica:
    """How well the ranks of a replica were kept busy, over ``steps`` steps."""

    replica: int
    ranks: int
    steps: int
    utilisation: float
    theory: float | None
    """what the schedule allows; None without a pipeline"""
    stages: int
    microbatches: int
    schedule: str


@dataclass(frozen=True, slots=True)
class Rank:
    """One process. ``shares``: of its time between first and last span, by name; what is in none of them is missing to
    1. A span within another one takes its time away from that."""

    process: Process
    seconds: float
    shares: dict[str, float]
    between_ranks: int
    """bytes that it has given to other ranks of its replica and got from them"""


@dataclass(frozen=True, slots=True)
class Measured:
    """All of a trace."""

    replicas: tuple[Replica, ...]
    ranks: tuple[Rank, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a trace that is to be drawn. ``rows``: a process and its spans in it, longer ones first."""

    begin_ns: int
    end_ns: int
    title: str
    rows: tuple[tuple[Process, tuple[Span, ...]], ...]


def measure(trace: Trace) -> Measured:
    """Everything that is told of a trace."""
    groups: dict[int, list[Process]] = defaultdict(list)
    for process in trace.processes:
        groups[process.replica].append(process)
    replicas = [found for number, group in sorted(groups.items()) if (found := _replica(number, group)) is not None]
    return Measured(tuple(replicas), tuple(_rank(process) for process in trace.processes))


def utilisation(ranks: Sequence[Iterable[Span]]) -> float:
    """Busy area over total area of one step, given by rank; 0 where nothing is computed."""
    busy = [merged((s.begin_ns, s.end_ns) for s in spans if s.name in BUSY) for spans in ranks]
    ends = [edge for intervals in busy for interval in intervals for edge in interval]
    if not ends or max(ends) == min(ends):
        return 0.0
    return sum(_length(intervals) for intervals in busy) / ((max(ends) - min(ends)) * len(busy))


def theory(microbatches: int, stages: int, interleaved: int = 1) -> float:
    """Utilisation that a schedule allows, with stages of equal cost; see the module."""
    return microbatches / (microbatches + (stages - 1) / interleaved)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals that do not touch, and cover the same."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def own_time(spans: Iterable[Span]) -> dict[str, int]:
    """Nanoseconds by name, without those of spans within, for one process; each thread for itself."""
    total: dict[str, int] = defaultdict(int)
    open_: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.begin_ns, -s.end_ns)):
        stack = open_[span.thread]
        while stack and stack[-1].end_ns <= span.begin_ns:
            stack.pop()
        if stack:  # where they only overlap, the later one has the common time
            total[stack[-1].name] -= min(span.end_ns, stack[-1].end_ns) - span.begin_ns
        total[span.name] += span.end_ns - span.begin_ns
        stack.append(span)
    return dict(total)


def window(trace: Trace, first: int | None, steps: int) -> Window:
    """Steps ``first`` to ``first + steps - 1`` of all processes. Raises :class:`ConfigError` where there are none.

    Processes count their steps each for itself, so this is where the first process with such steps was.
    """
    known = sorted({s.step for p in trace.processes for s in p.spans if s.name in BUSY})
    known = known or sorted({s.step for p in trace.processes for s in p.spans})
    if not known:
        raise ConfigError("no worker has recorded a span: it ended before its first step")
    if first is None:
        first = known[max(0, (len(known) - steps) // 2)]
    chosen = range(first, first + steps)
    inside = [s for p in trace.processes for s in p.spans if s.step in chosen]
    if not inside:
        raise ConfigError(f"--from {first}: the trace has steps {known[0]} to {known[-1]}")
    begin, end = min(s.begin_ns for s in inside), max(s.end_ns for s in inside)
    if len({p.replica for p in trace.processes}) > 1:
        lead = next(p for p in trace.processes if any(s.step in chosen for s in p.spans))
        own = [s for p in trace.processes if p.replica == lead.replica for s in p.spans if s.step in chosen]
        begin, end = min(s.begin_ns for s in own), max(s.end_ns for s in own)
    rows = []
    for process in trace.processes:
        there = [s for s in process.spans if s.end_ns > begin and s.begin_ns < end]
        rows.append((process, tuple(sorted(there, key=lambda s: s.begin_ns - s.end_ns))))
    last = chosen[-1]
    return Window(begin, end, f"step {first}" if steps == 1 else f"steps {first} to {last}", tuple(rows))


def _replica(number: int, group: Sequence[Process]) -> Replica | None:
    by_step: dict[tuple[int, int], dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for process in group:
        for span in process.spans:
            if span.name in BUSY:
                by_step[process.epoch, span.step][process.rank].append(span)
    place = group[0].place
    size = int(place.get("ranks", 1))
    # A step that was cut off says nothing.
    whole = [ranks for _, ranks in sorted(by_step.items()) if len(ranks) == size]
    steady = whole[WARM_UP:] if len(whole) > 2 * WARM_UP else whole
    if not steady:
        return None
    stages, microbatches = group[0].stages, int(place.get("microbatches", 1))
    schedule = str(place.get("schedule", ""))
    interleaved = int(place.get("interleave", 1)) if schedule == "interleaved" else 1
    area = busy = 0.0
    for ranks in steady:
        spans = [s for of_rank in ranks.values() for s in of_rank]
        total = (max(s.end_ns for s in spans) - min(s.begin_ns for s in spans)) * size
        area += total
        busy += utilisation(list(ranks.values())) * total
    best = theory(microbatches, stages, interleaved) if stages > 1 else None
    return Replica(number, size, len(steady), busy / area if area else 0.0, best, stages, microbatches, schedule)


def _rank(process: Process) -> Rank:
    spans = process.spans
    if not spans:
        return Rank(process, 0.0, {}, 0)
    total = max(s.end_ns for s in spans) - spans[0].begin_ns
    shares = {name: ns / total for name, ns in sorted(own_time(spans).items())} if total else {}
    between = sum(int(s.facts.get("bytes", 0)) for s in spans if s.name in BETWEEN)
    return Rank(process, total / 1e9, shares, between)


def _length(intervals: Iterable[Interval]) -> int:
    return sum(end - begin for begin, end in intervals)
