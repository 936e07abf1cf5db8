"""What a coordinator says about a job, with names and types. Tolerates what other versions leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from downpour.jobs.errors import JobCancelled
from downpour_common.errors import JobFailed
from downpour_common.messages import Document
from downpour_common.replicas import titled

ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


@dataclass(frozen=True, slots=True)
class JobFailure:
    """The first process that ended badly. ``index`` -1: not one process; ``exit_code`` None: nobody saw it end."""

    role: str
    index: int
    host: str
    exit_code: int | None
    message: str
    details: str
    """its traceback, or its last output"""
    ranks: int = 1
    """workers of each replica"""

    @property
    def who(self) -> str:
        """``worker/3``, and where it stands in its replica if that has several"""
        return titled(self.role, self.index, self.ranks) if self.index >= 0 else self.role


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as the coordinator described it at one moment. Times in seconds."""

    id: str
    name: str
    state: str
    reason: str
    message: str
    workers: int
    """workers that are in the job now"""
    workers_wanted: int
    shards: int
    mode: str
    restarts: int
    clock: int
    epoch: int
    samples: int
    samples_per_s: float
    metrics: dict[str, float | None]
    waiting_for: tuple[str, ...]
    waiting_s: float
    elapsed_s: float
    position: int
    """place in the queue, 1 is next; 0: not queued"""
    failure: JobFailure | None
    warnings: tuple[str, ...]
    degraded: str
    exit_code: int | None
    model: bool
    """whether model.safetensors can be fetched"""
    document: Document = field(repr=False)
    """all of it, as it came"""

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED

    @property
    def succeeded(self) -> bool:
        """Whether the weights are there."""
        return self.state == "SUCCEEDED"

    def line(self) -> str:
        """What the job does, in one line."""
        if self.state == "PENDING":
            text = f"in the queue, position {self.position}" if self.position else "waiting for room"
            return f"{text}{f': {self.message}' if self.message else ''} ({self.elapsed_s:.0f} s)"
        if self.waiting_for and not self.ended:
            shown = ", ".join(self.waiting_for[:8])
            more = len(self.waiting_for) - 8
            return f"waiting for {shown}{f' and {more} more' if more > 0 else ''} ({self.waiting_s:.0f} s)"
        if self.state != "RUNNING":
            return f"{self.state}{f': {self.message}' if self.message else ''}"
        parts = [f"step {self.clock}", f"epoch {self.epoch}", f"{self.samples_per_s:,.0f} samples/s"]
        parts += [f"{name} {value:.4g}" for name, value in list(self.metrics.items())[:3] if value is not None]
        stale = _mapping(self.document.get("staleness"))
        if {"p50", "p99", "max"} <= set(stale):
            parts.append(f"staleness {stale['p50']}/{stale['p99']}/{stale['max']}")
        if self.workers != self.workers_wanted:
            parts.append(f"{self.workers} of {self.workers_wanted} workers")
        if self.degraded:
            parts.append(f"DEGRADED: {self.degraded}")
        return "  ".join(parts)

    def check(self) -> JobStatus:
        """Itself, of a job that has succeeded or goes on; raises :class:`JobFailed`, :class:`JobCancelled` else."""
        if self.state == "CANCELLED":
            raise JobCancelled(self)
        if self.state != "FAILED":
            return self
        failure = self.failure or JobFailure("job", -1, "", self.exit_code, self.message or "no reason given", "")
        raise JobFailed(
            job=self.id,
            role=failure.role,
            index=failure.index,
            host=failure.host,
            exit_code=failure.exit_code,
            message=failure.message,
            traceback=failure.details,
        )


def job_status(document: Document) -> JobStatus:
    """Read a job document."""
    workers = _mapping(document.get("workers"))
    failure = document.get("failure")
    return JobStatus(
        id=str(document.get("job", "")),
        name=str(document.get("name", "")),
        state=str(document.get("state", "")),
        reason=str(document.get("reason", "")),
        message=str(document.get("message", "")),
        workers=_int(workers.get("live")),
        workers_wanted=_int(workers.get("wanted")),
        shards=_int(document.get("shards")),
        mode=str(document.get("mode", "")),
        restarts=_int(document.get("restarts")),
        clock=_int(document.get("clock")),
        epoch=_int(document.get("epoch")),
        samples=_int(document.get("samples")),
        samples_per_s=_float(document.get("samples_per_s")),
        metrics={str(k): _number(v) for k, v in _mapping(document.get("metrics")).items()},
        waiting_for=tuple(map(str, document.get("waiting_for") or ())),
        waiting_s=_float(document.get("waiting_s")),
        elapsed_s=_float(document.get("elapsed_s")),
        position=_int(document.get("position")),
        failure=_failure(failure) if isinstance(failure, dict) else None,
        warnings=tuple(map(str, document.get("warnings") or ())),
        degraded=str(document.get("degraded") or ""),
        exit_code=None if document.get("exit_code") is None else _int(document["exit_code"]),
        model=bool(document.get("model")),
        document=document,
    )


def _failure(document: Mapping[str, Any]) -> JobFailure:
    code = document.get("exit_code")
    return JobFailure(
        role=str(document.get("role", "")),
        index=_int(document.get("index"), -1),
        host=str(document.get("host") or ""),
        exit_code=code if isinstance(code, int) else None,
        message=str(document.get("message", "")),
        details=str(document.get("details") or ""),
        ranks=_int(document.get("ranks"), 1),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _int(value: Any, default: int = 0) -> int:
    return int(value) if isinstance(value, (int, float)) else default


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
