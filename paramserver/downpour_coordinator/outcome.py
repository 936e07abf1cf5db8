"""How a job ended, and what it did: the figures of the closing report and of ``--json``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from downpour_common import exitcodes
from downpour_common.replicas import is_lead
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.measures import Measures, measure
from downpour_coordinator.processes import Failure
from downpour_coordinator.training import Training

State = Literal["SUCCEEDED", "FAILED", "INTERRUPTED", "CANCELLED"]


@dataclass(slots=True)
class Outcome:
    """The result of a job. Times in seconds."""

    job: str
    state: State
    exit_code: int
    out: str
    model: str | None
    wall_s: float
    train_s: float
    start_s: float | None
    failure: Failure | None
    steps: int = 0
    samples: int = 0
    pushes: int = 0
    pulls: int = 0
    bytes_moved: int = 0
    wait_share: float = 0.0
    measures: Measures | None = None
    target: dict[str, Any] | None = None
    """what was to be reached, and when it was; None: nothing was"""
    clock_gap_max: int = 0
    replicas: int = 0
    ranks: int = 1
    """workers of each replica"""
    restarts: int = 0
    lost_pushes: int = 0
    """pushes that were applied, and are gone with a shard that has died, of all shards"""
    lost: dict[str, int] = field(default_factory=dict)
    """contributions to single chunks among them, by shard"""
    non_finite: dict[str, int] = field(default_factory=dict)
    """contributions to chunks with NaN or Inf that were left out, by worker"""
    uncompensated: int = 0
    """contributions to chunks, applied as they were because the weights that they were computed on were not there"""
    late: dict[str, int] = field(default_factory=dict)
    """``sync,backup=b``: contributions that came after their round and were not applied, by worker"""
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def samples_per_s(self) -> float:
        """Training samples per second, from the first step's start to the last worker's end."""
        return self.samples / self.train_s if self.train_s > 0 else 0.0

    @property
    def steps_per_s(self) -> float:
        """Steps of the worker with the most, per second of the same time."""
        return self.steps / self.train_s if self.train_s > 0 else 0.0

    @property
    def staleness(self) -> dict[str, float]:
        """Mean, p50, p99 and max of the contributions' staleness in updates; empty without any."""
        return self.measures.staleness if self.measures else {}

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        failure = self.failure
        return {
            "job": self.job,
            "state": self.state,
            "exit_code": self.exit_code,
            "steps": self.steps,
            "samples": self.samples,
            "samples_per_s": round(self.samples_per_s, 3),
            "wall_s": round(self.wall_s, 3),
            "train_s": round(self.train_s, 3),
            "start_s": None if self.start_s is None else round(self.start_s, 3),
            "pushes": self.pushes,
            "pulls": self.pulls,
            "bytes": self.bytes_moved,
            "wait_share": round(self.wait_share, 4),
            **(self.measures.document() if self.measures else {}),
            "target": self.target,
            "clock_gap_max": self.clock_gap_max,
            "replicas": self.replicas,
            "ranks": self.ranks,
            "restarts": self.restarts,
            "lost_pushes": self.lost_pushes,
            "lost": self.lost,
            "non_finite": self.non_finite,
            "late": self.late,
            "uncompensated": self.uncompensated,
            "metrics": {k: v if math.isfinite(v) else None for k, v in self.metrics.items()},
            "out": self.out,
            "model": self.model,
            "warnings": self.warnings,
            "failure": failure.document() if failure else None,
        }


def outcome_of(job: Lifecycle, out: str, now_s: float) -> Outcome:
    """How a job that is over (or not yet) stands. ``exit_code``: of what failed first; 103 where it was cancelled."""
    state: State = "SUCCEEDED"
    code = exitcodes.OK
    if job.failure is not None:
        state, code = "FAILED", job.failure.exit_code or exitcodes.FAILED
    elif job.state == "CANCELLED":
        state = "INTERRUPTED" if job.interrupted == "INTERRUPTED" else "CANCELLED"
        code = exitcodes.JOB_CANCELLED
    began_s = now_s if job.begun_s is None else job.begun_s
    first_s = job.first_step_s
    outcome = Outcome(
        job=job.spec.name,
        state=state,
        exit_code=code,
        out=out,
        model=os.path.join(out, "model.safetensors") if job.model else None,
        wall_s=now_s - began_s,
        train_s=job.counted_s(now_s),
        start_s=first_s - began_s if first_s is not None else None,
        failure=job.failure,
        replicas=job.wanted // job.spec.ranks,
        ranks=job.spec.ranks,
        restarts=job.restarts,
        warnings=job.remarks,
    )
    fill_figures(outcome, job.training)
    outcome.measures = measure(job.training, job.spec, outcome.train_s)
    outcome.target = job.recorder.target.figures()
    return outcome


def fill_figures(outcome: Outcome, state: Training) -> None:
    """Add what the coordinator knows."""
    reports = [*state.former, *(w.progress for w in state.workers.values() if w.progress is not None)]
    outcome.steps = max((p.clock - state.facts.clock for p in reports), default=0)
    outcome.samples = sum(p.samples for p in reports if is_lead(p.slot, state.facts.ranks))
    outcome.pushes = sum(p.pushes for p in reports)
    outcome.pulls = sum(p.pulls for p in reports)
    outcome.bytes_moved = sum(p.bytes_sent + p.bytes_received for p in reports)
    if reports and outcome.train_s > 0:
        slots = len({p.slot for p in reports})
        outcome.wait_share = min(1.0, sum(p.wait_s for p in reports) / (outcome.train_s * slots))
    outcome.clock_gap_max = state.clock_gap_max()
    lost = state.lost()
    outcome.lost_pushes = sum(n.pushes for n in lost.values())
    outcome.lost = {f"server/{index}": n.contributions for index, n in lost.items()}
    outcome.non_finite = {f"worker/{slot}": n for slot, n in sorted(state.non_finite().items())}
    outcome.uncompensated = state.uncompensated()
    outcome.late = {f"worker/{slot}": n for slot, n in sorted(state.late().items())}
    outcome.metrics = dict(state.latest)
