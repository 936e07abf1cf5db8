"""The recovery benchmark's cases, and what the workers' times come to. Times in seconds of one clock.

Pure: no process and no file here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from bench_lib.training import Trainer, Workload

Victim = Literal["worker", "shard", "leader"]
Mode = Literal["async", "sync"]
WORKERS = 2
RESTARTS = 100
BEFORE_S = 5.0
"""How much of the undisturbed time before a kill the steps after it are compared with."""


@dataclass(frozen=True)
class Case:
    """What is killed in which job. ``kills``: one after the other in each job."""

    victim: Victim
    mode: Mode
    model: str
    jobs: int = 1
    kills: int = 5
    checkpoint_s: float = 60.0
    settle_s: float = 5.0
    """before each kill, from when all is well"""

    @property
    def name(self) -> str:
        """For the command line and the results."""
        return f"{self.victim}-{self.mode}-{self.model}"

    @property
    def begins_again(self) -> bool:
        """Whether the whole job does, after a kill: all its processes are others then."""
        return (self.victim, self.mode) == ("shard", "sync")

    @property
    def compared(self) -> bool:
        """Whether the other's steps are of interest; in sync it waits, and that is the gap."""
        return (self.victim, self.mode) == ("worker", "async")

    @property
    def options(self) -> list[str]:
        """Of ``downpour run``."""
        given = ["-w", str(WORKERS), "--mode", self.mode, "--restarts", str(RESTARTS)]
        given += ["--set", f"checkpoint_s={self.checkpoint_s:g}"]
        return [*given, "--replication", "2"] if self.victim == "leader" else given


MODELS = ("mlp25m", "digits")
MODES: tuple[Mode, ...] = ("async", "sync")
CASES = [
    # Processes that die within ten seconds, one after the other, are waited with before they are replaced.
    *(Case("shard", "async", model, checkpoint_s=5.0, settle_s=9.0) for model in MODELS),
    # A job that begins again a second time in a row waits before it does.
    *(Case("shard", "sync", model, jobs=5, kills=1, checkpoint_s=5.0) for model in MODELS),
    # Each time, a new backup must have caught up, or it is the death of a shard without one.
    *(Case("leader", mode, model, kills=3, settle_s=12.0) for mode in MODES for model in MODELS),
    *(Case("worker", mode, model) for mode in MODES for model in MODELS),
]


@dataclass(frozen=True)
class Cost:
    """Something that makes a job ready for a death, and what it is looked at with."""

    what: str
    mode: Mode
    workload: Workload
    options: tuple[str, ...]
    """of ``downpour run``, to have it"""

    @property
    def name(self) -> str:
        """For the command line and the results."""
        return f"{self.what}-{self.mode}-{self.workload.model}"

    @property
    def without(self) -> Trainer:
        """The job that does not have it."""
        return Trainer("without", "ours", WORKERS, ("--mode", self.mode))

    @property
    def with_it(self) -> Trainer:
        """The job that has it."""
        return Trainer("with", "ours", WORKERS, ("--mode", self.mode, *self.options))


_LOOKED_AT = (
    Workload("mlp25m-adam", "mlp25m", "adam", batch=64, steps=10, warm=1),
    Workload("digits-adam", "digits", "adam", batch=32, steps=1000, warm=20),
)
COSTS = [
    *(Cost("replication", mode, work, ("--replication", "2")) for mode in MODES for work in _LOOKED_AT),
    *(Cost("restarts", "sync", work, ("--restarts", "5")) for work in _LOOKED_AT),  # it keeps the weights before
]
NAMES = [*(case.name for case in CASES), *(cost.name for cost in COSTS)]
QUICK = [name for name in NAMES if name.endswith("-digits")]


@dataclass(frozen=True)
class Trace:
    """What one worker process has noted."""

    slot: int
    pid: int
    joined_s: float
    steps_s: list[float] = field(default_factory=list)
    """when each step was done"""


@dataclass(frozen=True)
class Recovery:
    """What followed one kill."""

    gap_s: float
    """the longest time between two steps of a worker that lived on; where none does, of a slot"""
    back_s: float
    """from the kill to the end of that gap"""
    joined_s: float | None
    """from the kill until the worker that replaces the killed one had joined; None: no worker was killed"""
    trains_s: float | None
    """… and had done its first step"""
    before_s: list[float]
    """how long the other worker's steps took before the kill …"""
    during_s: list[float]
    """… and from then until the replacement had done its first"""
    checkpoint_age_s: float
    """of the newest committed checkpoint, at the kill"""
    steps_since: int
    """of all workers, since that commit"""


def evaluate(traces: Sequence[Trace], kill_s: float, killed: int | None, since_s: float, commit_s: float) -> Recovery:
    """What followed the kill at ``kill_s``, of the worker in slot ``killed`` or of a shard (None).

    ``since_s``: steps before are no comparison; ``commit_s``: of the newest checkpoint. Raises :class:`ValueError`
    where a slot has no step after the kill.
    """
    slots = sorted({trace.slot for trace in traces} - {killed})
    gap_s, end_s = max(longest_gap(steps_of(traces, slot), kill_s) for slot in slots)
    steps = [s for trace in traces for s in trace.steps_s]
    joined_s = trains_s = None
    before_s: list[float] = []
    during_s: list[float] = []
    if killed is not None:
        after = [t for t in traces if t.slot == killed and t.joined_s > kill_s and t.steps_s]
        if not after:
            raise ValueError(f"worker/{killed} has not been replaced")
        joined_s, trains_s = after[0].joined_s, after[0].steps_s[0]
        (other,) = slots
        steps_s = steps_of(traces, other)
        before_s = lengths(steps_s, max(since_s, kill_s - BEFORE_S), kill_s)
        during_s = lengths(steps_s, kill_s, trains_s)
    return Recovery(
        gap_s=gap_s,
        back_s=end_s - kill_s,
        joined_s=None if joined_s is None else joined_s - kill_s,
        trains_s=None if trains_s is None else trains_s - kill_s,
        before_s=before_s,
        during_s=during_s,
        checkpoint_age_s=kill_s - commit_s,
        steps_since=sum(commit_s < s <= kill_s for s in steps),
    )


def longest_gap(steps_s: Sequence[float], kill_s: float) -> tuple[float, float]:
    """The longest time between two steps, the second of which came after the kill, and when that was.

    The first step after a kill may have had its answer before, so that it tells nothing.
    """
    gaps = [(after - before, after) for before, after in pairwise(steps_s) if after > kill_s]
    if not gaps:
        raise ValueError("there is no step after the kill")
    return max(gaps)


def summary(
    case: Case, recoveries: Sequence[Recovery], documents: Sequence[Mapping[str, Any]], control: Sequence[float] = ()
) -> dict[str, Any]:
    """A case's result for the JSON file; ``documents``: what its jobs said at their ends; ``control``: where the case
    is ``compared``, how long steps take while a process starts that has nothing to do with the job."""
    row: dict[str, Any] = {
        "case": case.name,
        "victim": case.victim,
        "mode": case.mode,
        "model": case.model,
        "kills": len(recoveries),
        **_spread("gap_s", [r.gap_s for r in recoveries]),
        **_spread("back_s", [r.back_s for r in recoveries]),
    }
    if case.victim == "worker":
        row |= _spread("joined_s", [r.joined_s for r in recoveries if r.joined_s is not None])
        row |= _spread("trains_s", [r.trains_s for r in recoveries if r.trains_s is not None])
    if case.compared:
        for name in ("before_s", "during_s"):
            row[f"steps_{name}"] = _shares([length for r in recoveries for length in getattr(r, name)])
        row["steps_control_s"] = _shares(control)
        for name, of in (("steps_ratio", "steps_before_s"), ("steps_ratio_to_control", "steps_control_s")):
            row[name] = {at: row["steps_during_s"][at] / row[of][at] for at in ("p50", "p99")}
    row["lost_pushes"] = sum(document["lost_pushes"] for document in documents)
    row["restarts"] = sum(document["restarts"] for document in documents)
    if case.victim == "shard":
        row["checkpoint_age_s"] = [r.checkpoint_age_s for r in recoveries]
        row["steps_since"] = [r.steps_since for r in recoveries]
    return row


def share(values: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` of them do not exceed."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there are no values")
    return next(value for count, value in enumerate(ordered, 1) if count >= part * len(ordered))


def paired(without_s: Sequence[float], with_s: Sequence[float]) -> dict[str, Any]:
    """What something costs: of turns with and without that took place one after the other."""
    ratios = [b / a for a, b in zip(without_s, with_s, strict=True)]
    return {
        "without_s": statistics.median(without_s),
        "with_s": statistics.median(with_s),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def steps_of(traces: Sequence[Trace], slot: int) -> list[float]:
    """Of all processes that have had the slot."""
    return sorted(s for trace in traces if trace.slot == slot for s in trace.steps_s)


def lengths(steps_s: Sequence[float], from_s: float, to_s: float) -> list[float]:
    """How long the steps took that ended in between."""
    return [after - before for before, after in pairwise(steps_s) if from_s < after <= to_s]


def _shares(values: Sequence[float]) -> dict[str, Any]:
    return {"count": len(values), "p50": share(values, 0.5), "p99": share(values, 0.99)}


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: statistics.median(values), f"max_{name}": max(values), f"all_{name}": list(values)}
