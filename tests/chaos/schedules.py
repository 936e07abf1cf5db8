"""Random schedules of what is done to a job, each made from nothing but its seed.

A kind is a workload, a mode and the faults that it must survive; :data:`KINDS` has them all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

PASSES, SAMPLES, STEPS = 3, 397, 400
"""Of the workloads; at 2 workers and batches of 4 a pass has 50 steps."""
SPAN_S = 1.4
"""About how long an undisturbed job trains: faults come within that."""
SHARD_POINTS = ("shard.receive", "shard.apply.before", "shard.apply.after", "shard.reply.before")
SNAPSHOT_POINTS = ("shard.snapshot.before", "shard.snapshot.after", "file.write.after", "file.rename.after")
WORKER_POINTS = ("worker.push.before", "worker.push.sent", "worker.push.after")
ENDING_POINTS = ("worker.end_epoch.before", "worker.end_epoch.after", "worker.leave.before", "worker.goodbye.before")


@dataclass(frozen=True, slots=True)
class Kind:
    """``oracle``: bitwise, ledger or census. ``where``: run (``downpour run``), resume (the command itself is killed,
    and run again with --resume) or cluster (with daemons). ``victims``: roles that are killed, by weight."""

    oracle: str
    mode: str
    where: str
    victims: tuple[str, ...]
    replication: int = 1
    exact: bool = False
    """whether the loss that is reported must be the ledger's"""


KINDS: dict[str, Kind] = {
    "sync": Kind("bitwise", "sync", "run", ("server", "worker")),
    "sync-census": Kind("census", "sync", "run", ("server", "worker")),
    "sync-resume": Kind("bitwise", "sync", "resume", ("coordinator", "server", "worker")),
    "sync-cluster": Kind("bitwise", "sync", "cluster", ("coordinator", "coordinator", "server", "worker")),
    "async-shards": Kind("ledger", "async", "run", ("server",), exact=True),
    "async": Kind("ledger", "async", "run", ("server", "worker")),
    "async-census": Kind("census", "async", "run", ("server",)),
    "async-cluster": Kind("ledger", "async", "cluster", ("coordinator", "coordinator", "server", "worker")),
    "ssp-shards": Kind("ledger", "ssp:3", "run", ("server",), exact=True),
    "async-replicated": Kind("ledger", "async", "run", ("server",), 2),
    "sync-replicated": Kind("bitwise", "sync", "run", ("server", "worker"), 2),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` seconds into the training ``action`` (kill or stop) comes over ``role``/``index``."""

    after_s: float
    action: str
    role: str
    index: int
    lasts_s: float = 0.0

    def __str__(self) -> str:
        lasts = f"+{self.lasts_s}s" if self.lasts_s else ""
        return f"{self.action}:{self.role}/{self.index}@{self.after_s}s{lasts}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run. ``failpoints``: as the environment has them."""

    seed: int
    kind: str
    workers: int
    shards: int
    norm: bool
    checkpoint_s: float
    transport: str
    faults: tuple[Fault, ...]
    failpoints: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        items = ",".join(map(str, self.faults)) or "nothing"
        norm = ", BatchNorm" if self.norm else ""
        points = f"; failpoints {'; '.join(self.failpoints)}" if self.failpoints else ""
        return (
            f"{self.kind} with {self.workers} workers, {self.shards} shards{norm}, {self.transport}, a checkpoint each "
            f"{self.checkpoint_s} s: {items}{points}"
        )

    @property
    def kills(self) -> list[str]:
        """The roles that it kills."""
        by_failpoint = [
            p.partition("[")[2].partition("/")[0].partition("#")[0] for p in self.failpoints if "=kill" in p
        ]
        return [f.role for f in self.faults if f.action == "kill"] + by_failpoint


def draw(seed: int, kind_name: str) -> Schedule:
    """The schedule of this seed."""
    lot = random.Random(f"{kind_name} {seed}")
    kind = KINDS[kind_name]
    workers, shards = lot.choice([(2, 2), (2, 2), (2, 1), (3, 2), (1, 2)])
    faults: list[Fault] = []
    failpoints: list[str] = []
    for _ in range(lot.choice([1, 1, 2, 2, 3])):
        role = lot.choice(kind.victims)
        if role == "server" and kind.replication > 1:  # while the other one of the two could go on
            role = lot.choice(["leader", "leader", "backup"])
        index = lot.randrange(workers if role == "worker" else 1 if role == "coordinator" else shards)
        way = lot.random()
        if way < 0.25 and kind.where != "cluster" and role in ("server", "worker"):
            failpoints.append(_failpoint(lot, kind, role, index))
        elif way < 0.4 and role != "coordinator":
            faults.append(
                Fault(round(lot.uniform(0.05, SPAN_S), 3), "stop", role, index, round(lot.uniform(0.1, 1.0), 2))
            )
        else:
            faults.append(Fault(round(lot.uniform(0.05, SPAN_S), 3), "kill", role, index))
    return Schedule(
        seed,
        kind_name,
        workers,
        shards,
        kind.oracle == "bitwise" and lot.random() < 0.3,
        lot.choice([0.3, 0.6, 1.2]),
        lot.choice(["ipc", "ipc", "tcp"]),
        tuple(sorted(faults, key=lambda f: f.after_s)),
        tuple(failpoints),
    )


def _failpoint(lot: random.Random, kind: Kind, role: str, index: int) -> str:
    """A process kills itself at a point, once: its replacement is of another epoch."""
    if role == "server":
        points = lot.choice([SHARD_POINTS, SHARD_POINTS, SNAPSHOT_POINTS])
        most = 3 if points is SNAPSHOT_POINTS else 300
    else:
        synchronous = kind.mode == "sync" and kind.oracle != "ledger"
        points = lot.choice([WORKER_POINTS, WORKER_POINTS, ENDING_POINTS if synchronous else ENDING_POINTS[2:]])
        most = 140 if points is WORKER_POINTS else 1
    return f"{lot.choice(points)}[{role}/{index}#0]=kill@{lot.randint(1, most)}"
