"""What rules look at: a run's description and measures, with names and types. Tolerates what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from downpour_common.config import JobSpec
from downpour_common.modes import Mode

LOSSES = ("loss", "train_loss", "training_loss")


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker. ``throughput`` in samples per second, None if it counts none; ``wait_share`` of its time."""

    name: str
    throughput: float | None
    wait_share: float
    staleness: float
    """mean"""


@dataclass(frozen=True, slots=True)
class Server:
    """One shard. ``busy``: share of the time that it computes, None if not known; bytes it has got and sent."""

    name: str
    busy: float | None
    bytes: int
    refused: int


@dataclass(frozen=True, slots=True)
class Facts:
    """A run, finished or not. Times in seconds; ``None``: not known."""

    job: str
    state: str
    spec: JobSpec
    steps: int = 0
    samples: int = 0
    train_s: float = 0.0
    throughput: float = 0.0
    wait_share: float = 0.0
    bytes_moved: int = 0
    """by all workers, whether or not they were sent"""
    batch: float = 0.0
    batch_total: float = 0.0
    noise_scale: float | None = None
    unmeasured: str = ""
    efficiency: float | None = None
    goodput: float | None = None
    staleness: Mapping[str, float] | None = None
    workers: tuple[Worker, ...] = ()
    servers: tuple[Server, ...] = ()
    pushes: int = 0
    late: int = 0
    non_finite: int = 0
    lost_pushes: int = 0
    clock_gap_max: int = 0
    reached: bool | None = None
    """the target; None: there is none"""
    losses: tuple[float, ...] = ()
    """as they were logged, NaN and infinity included"""
    shares: Mapping[str, float] | None = None
    """of a traced job's time, by span, on average over its workers"""
    sent: bool = True
    """payloads travel between processes, and do not lie in memory that they share"""

    @property
    def mode(self) -> Mode:
        """How its replicas agree."""
        return self.spec.parsed_mode

    @property
    def step_s(self) -> float:
        """Time of one step."""
        return self.train_s / self.steps if self.steps else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Of all workers."""
        return self.bytes_moved / self.train_s if self.train_s else 0.0

    @property
    def mean_staleness(self) -> float:
        """In updates; 0 if there is none."""
        return float((self.staleness or {}).get("mean", 0.0))


def facts_of(
    spec: JobSpec,
    document: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
    shares: Mapping[str, float] | None = None,
    state: str = "",
    sent: bool = True,
) -> Facts:
    """Put together a summary (or a job's document, or what :func:`measured_last` found) and the rows of its metrics."""
    stale = document.get("staleness")
    target = document.get("target")
    return Facts(
        job=str(document.get("job") or spec.name),
        state=str(document.get("state") or state),
        spec=spec,
        steps=_int(document.get("steps", document.get("clock"))),
        samples=_int(document.get("samples")),
        train_s=_float(document.get("train_s")) or 0.0,
        throughput=_float(document.get("throughput")) or 0.0,
        wait_share=_wait_share(document),
        bytes_moved=_int(document.get("bytes")) or sum(_int(s.get("bytes")) for s in _named(document, "by_server")),
        batch=_float(document.get("batch")) or 0.0,
        batch_total=_float(document.get("batch_total")) or 0.0,
        noise_scale=_float(document.get("noise_scale")),
        unmeasured=str(document.get("unmeasured") or ""),
        efficiency=_float(document.get("efficiency")),
        goodput=_float(document.get("goodput")),
        staleness=stale if isinstance(stale, Mapping) and stale else None,
        workers=tuple(
            Worker(
                str(w["name"]),
                _float(w.get("throughput")),
                _float(w.get("wait_share")) or 0.0,
                _float((w.get("staleness") or {}).get("mean")) or 0.0,
            )
            for w in _named(document, "by_worker")
        ),
        servers=tuple(
            Server(str(s["name"]), _float(s.get("busy")), _int(s.get("bytes")), _int(s.get("refused")))
            for s in _named(document, "by_server")
        ),
        pushes=_int(document.get("pushes")),
        late=_total(document.get("late")),
        non_finite=_total(document.get("non_finite")),
        lost_pushes=_int(document.get("lost_pushes")),
        clock_gap_max=_int(document.get("clock_gap_max")),
        reached=bool(target.get("reached")) if isinstance(target, Mapping) else None,
        losses=losses_in(rows),
        shares=shares,
        sent=sent,
    )


def read_rows(lines: Iterable[str | bytes]) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without those that are damaged."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def measured_last(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest measures among the rows, as :func:`facts_of` takes them; empty without any."""
    for row in reversed(rows):
        measures = row.get("measures")
        if isinstance(measures, dict):
            return {**row, **measures}
    return {}


def losses_in(rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """What was logged as the loss, in order; of several names the first that is known."""
    for name in LOSSES:
        found = []
        for row in rows:
            try:
                value = float(row[name])  # "nan" as well, see JobService
            except (KeyError, TypeError, ValueError):
                continue
            found.append(value)
        if found:
            return tuple(found)
    return ()


def _wait_share(document: Mapping[str, Any]) -> float:
    share = _float(document.get("wait_share"))
    if share is not None:
        return share
    shares = [_float(w.get("wait_share")) or 0.0 for w in _named(document, "by_worker")]
    return sum(shares) / len(shares) if shares else 0.0


def _named(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    table = document.get(key)
    if not isinstance(table, Mapping):
        return []
    return [{"name": name, **entry} for name, entry in table.items() if isinstance(entry, Mapping)]


def _total(counts: Any) -> int:
    return sum(_int(n) for n in counts.values()) if isinstance(counts, Mapping) else 0


def _int(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
