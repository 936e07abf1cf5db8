"""What one seed stands for: a job, a weather, and what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from downpour_common.config import JobSpec, Settings
from simulator.network import Weather

CHUNK_BYTES = 1024
PER_CHUNK = CHUNK_BYTES // 8
JOB = "job-sim"


@dataclass(frozen=True)
class Fault:
    """Something goes wrong with ``target``: once ``after`` messages have arrived, or, where there is a ``point``, when
    a process of that name comes to that failpoint for the ``after``th time. ``lasts_s``: for how long."""

    kind: str
    target: str
    after: int
    lasts_s: float = 0.0
    point: str = ""

    def __str__(self) -> str:
        where = f"at {self.point} no. {self.after}" if self.point else f"after {self.after} messages"
        return f"{self.kind} {self.target} {where}" + (f" for {self.lasts_s:.2f} s" if self.lasts_s else "")


@dataclass(frozen=True)
class Scenario:
    """``samples`` are in a pass, ``batch`` in a worker's batch."""

    seed: int
    mode: str
    workers: int
    shards: int
    tensors: int
    passes: int
    samples: int
    batch: int
    restarts: int
    checkpoint_s: float
    keep: int
    buffers: bool
    window_bytes: int
    n_push: int
    step_s: float
    weather: Weather
    faults: tuple[Fault, ...] = field(default=())

    @property
    def synchronous(self) -> bool:
        """Whether rounds keep the workers together."""
        return self.mode == "sync"

    def calm(self) -> Scenario:
        """The same work, and nothing goes wrong."""
        still = Weather(0.001, 0.0, 0.0, 0.0, 0.0)
        return replace(
            self, seed=0, faults=(), weather=still, restarts=max(1, self.restarts), step_s=0.01, window_bytes=1 << 20
        )

    def work(self) -> tuple[object, ...]:
        """What the result of a synchronous job follows from."""
        return (self.workers, self.shards, self.tensors, self.passes, self.samples, self.batch, self.buffers)

    def spec(self) -> JobSpec:
        """The job as its user describes it."""
        settings = Settings(
            chunk_bytes=CHUNK_BYTES,
            window_bytes=1 << 16,
            n_push=self.n_push,
            n_fetch=1,
            timeout_s=30.0,
            start_timeout_s=60.0,
            checkpoint_s=self.checkpoint_s,
            keep_checkpoints=self.keep,
            grace_s=1.0,
            shared_memory=False,
            overlap="off",
            in_place=False,
        )
        return JobSpec(
            name="sim",
            script="train.py",
            workers=self.workers,
            shards=self.shards,
            mode=self.mode,
            restarts=self.restarts,
            seed=7,
            settings=settings,
        )

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.mode}, {self.workers} workers, {self.shards} shards, {self.tensors} chunks, {self.passes} passes "
            f"of {self.samples} samples by {self.batch}; {', '.join(map(str, self.faults)) or 'no faults'}"
        )


POINTS = {
    "server": (
        "shard.receive",
        "shard.apply.before",
        "shard.apply.after",
        "shard.reply.before",
        "shard.snapshot.before",
        "shard.snapshot.after",
        "file.write.after",
        "file.rename.before",
        "file.rename.after",
    ),
    "worker": (
        "worker.push.before",
        "worker.push.sent",
        "worker.push.after",
        "worker.end_epoch.before",
        "worker.end_epoch.after",
        "worker.leave.before",
        "worker.goodbye.before",
    ),
    "coordinator": ("coordinator.commit.before", "coordinator.commit.after", "file.rename.before", "file.rename.after"),
}
KINDS = (
    ("kill", "worker", 5),
    ("kill", "server", 6),
    ("kill", "coordinator", 4),
    ("kill at", "worker", 4),
    ("kill at", "server", 4),
    ("kill at", "coordinator", 1),
    ("zombie", "worker", 2),
    ("zombie", "server", 2),
    ("stop", "worker", 1),
    ("stop", "server", 1),
    ("cut", "worker", 1),
    ("cut", "server", 1),
    ("power", "all", 2),
    ("flip", "disk", 2),
    ("full", "disk", 1),
)


def scenario(seed: int, mode: str | None = None) -> Scenario:
    """What ``seed`` stands for."""
    random = Random(seed)
    chosen = mode or random.choice(("sync", "sync", "async", "async", "ssp:0", "ssp:1", "ssp:3"))
    workers, shards = random.choice((1, 2, 2, 2, 3)), random.choice((1, 2, 2))
    weather = Weather(
        usual_s=random.choice((0.0005, 0.003, 0.02)),
        rare=random.choice((0.0, 0.02, 0.1)),
        long_s=random.choice((0.05, 0.5, 3.0)),
        loss=random.choice((0.0, 0.0, 0.02, 0.1)),
        copies=random.choice((0.0, 0.02, 0.2)),
    )
    made = Scenario(
        seed=seed,
        mode=chosen,
        workers=workers,
        shards=shards,
        # One chunk each, but in sync, where nothing is read off single chunks.
        tensors=random.choice((2, 2, 3)) if chosen == "sync" else shards * random.choice((1, 2)),
        passes=random.choice((1, 2, 2, 3)),
        samples=random.choice((8, 8, 13)),
        batch=random.choice((2, 4)),
        restarts=40,
        checkpoint_s=random.choice((0.3, 0.7, 2.0)),
        keep=random.choice((1, 2, 2, 3)),
        buffers=random.random() < 0.3,
        window_bytes=random.choice((2 << 10, 1 << 20)),
        n_push=random.choice((1, 1, 2)) if chosen == "async" else 1,
        step_s=random.choice((0.005, 0.05, 0.2)),
        weather=weather,
    )
    count = random.choice((0, 1, 1, 1, 2, 2, 3, 4))
    return replace(made, faults=tuple(_fault(made, random) for _ in range(count)))


def _fault(made: Scenario, random: Random) -> Fault:
    kind, role, _ = random.choices(KINDS, [weight for *_, weight in KINDS])[0]
    count = {"worker": made.workers, "server": made.shards}.get(role, 0)
    target = f"{role}/{random.randrange(count)}" if count else role
    lasts_s = random.choice((0.05, 0.5, 3.0)) * (0.5 + random.random())
    if kind == "kill at":
        point = random.choice(POINTS[role])
        return Fault("kill", target, random.choice((1, 1, 2, 3, 5, 8, 13)), lasts_s, point)
    steps = made.passes * made.samples / made.batch
    return Fault(kind, target, random.randrange(10, 40 + int(steps * made.tensors * 2.5)), lasts_s)
