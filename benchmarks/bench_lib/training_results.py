"""The training benchmark's numbers: steps and samples per second, ratios, and what was aimed at."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench_lib.documents import before, write_document
from bench_lib.machine import Machine
from bench_lib.runner import Outcome
from bench_lib.training import Trainer, Workload

SCHEMA = 1


@dataclass(frozen=True)
class Trained:
    """One contender's medians. A step is one step of each of its workers."""

    name: str
    group: str
    workers: int
    turns_s: list[float]
    step_s: float
    min_step_s: float
    max_step_s: float
    samples_per_s: float


@dataclass(frozen=True)
class Aim:
    """What the project promises: ``quantity`` of ``contender`` is ``at_least`` or ``at_most`` that of ``reference``.

    ``samples`` per second and ``step`` are ratios to the reference's; ``ms`` is a time, without a reference.
    """

    workload: str
    contender: str
    quantity: str
    reference: str
    limit: float

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.quantity == "samples"


# In milliseconds on a machine where the digits' step takes 0.46 in one process; the ratios say the same of any machine.
AIMS = [
    Aim("mlp25m-sgd", "downpour-async-2", "samples", "ddp-gloo", 1.5),
    Aim("mlp25m-sgd", "downpour-async-2-2s", "samples", "ddp-gloo", 1.5),
    Aim("mlp25m-sgd", "downpour-sync-2", "samples", "ddp-gloo", 1.25),
    Aim("mlp25m-sgd", "downpour-1", "step", "plain", 1.1),
    Aim("mlp25m-adam", "downpour-async-2", "samples", "ddp-gloo", 1.5),
    Aim("mlp25m-adam", "downpour-sync-2", "samples", "ddp-gloo", 1.25),
    Aim("mlp25m-adam", "downpour-1", "step", "plain", 1.1),
    Aim("digits-adam", "downpour-async-2", "ms", "", 0.9),
    Aim("digits-adam", "downpour-sync-2", "ms", "", 1.5),
    Aim("digits-adam", "downpour-async-2", "step", "plain", 1.96),
    Aim("digits-adam", "downpour-sync-2", "step", "plain", 3.26),
]


@dataclass(frozen=True)
class Reached:
    """An aim and what was measured."""

    aim: Aim
    measured: float
    passed: bool


@dataclass(frozen=True)
class Section:
    """One workload, all contenders in turn."""

    date: str  # UTC, ISO 8601
    machine: Machine
    workload: Workload
    rounds: int
    results: list[Trained]
    ratios: dict[str, dict[str, float]]  # [a][b]: a's samples per second over b's
    aims: list[Reached]
    idle_load: float  # cores used by all contenders together while none had its turn
    failed: dict[str, str]


def conclude(workload: Workload, trainers: list[Trainer], rounds: int, machine: Machine, outcome: Outcome) -> Section:
    """Medians and ratios of what was timed."""
    results = [
        _trained(trainer, workload, outcome.samples_s[trainer.name])
        for trainer in trainers
        if trainer.name in outcome.samples_s
    ]
    by_name = {result.name: result for result in results}
    return Section(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        workload=workload,
        rounds=rounds,
        results=results,
        ratios={a: {b: by_name[a].samples_per_s / by_name[b].samples_per_s for b in by_name} for a in by_name},
        aims=[reached for aim in AIMS if aim.workload == workload.name and (reached := _look(aim, by_name))],
        idle_load=outcome.idle_load,
        failed=outcome.failed,
    )


def _trained(trainer: Trainer, workload: Workload, turns_s: list[float]) -> Trained:
    step_s = statistics.median(turns_s) / workload.steps
    return Trained(
        name=trainer.name,
        group=trainer.group,
        workers=trainer.workers,
        turns_s=turns_s,
        step_s=step_s,
        min_step_s=min(turns_s) / workload.steps,
        max_step_s=max(turns_s) / workload.steps,
        samples_per_s=trainer.workers * workload.batch / step_s,
    )


def _look(aim: Aim, by_name: Mapping[str, Trained]) -> Reached | None:
    ours = by_name.get(aim.contender)
    theirs = by_name.get(aim.reference)
    if ours is None or (aim.reference and theirs is None):
        return None
    if theirs is None:
        measured = ours.step_s * 1000
    elif aim.quantity == "samples":
        measured = ours.samples_per_s / theirs.samples_per_s
    else:
        measured = ours.step_s / theirs.step_s
    return Reached(aim, measured, measured >= aim.limit if aim.at_least else measured <= aim.limit)


def write_json(sections: list[Section], path: Path) -> None:
    """Put the sections into the file in one step; sections of other workloads in it stay."""
    document = before(path, "training", SCHEMA) or {"schema": SCHEMA, "benchmark": "training", "sections": {}}
    document["sections"].update({section.workload.name: asdict(section) for section in sections})
    write_document(path, document)
