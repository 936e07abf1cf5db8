"""Shards that come back while workers go on, and workers whose place another one takes: nothing counts twice, what is
lost is counted, and in ``sync`` nothing is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, Dataset, TensorDataset

import downpour.randomness
from downpour.context import WorkerContext
from downpour.session import Session
from harness import CONTEXT, Job, make_job, repeat_at_once


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repeated every two seconds is repeated at once."""
    repeat_at_once(monkeypatch)


# ---------------------------------------------------------------- shards: a ledger in the weights

STEPS = 120
ROWS = 4


@dataclass
class Ledger:
    """Each push adds 1 to an element of its own in every row, which are chunks of their own: so the weights say which
    contributions the shards hold, and how often."""

    workers: int
    push: bool = False
    wait: Callable[[Session, int], None] = lambda *_: None
    done: dict[int, int] = field(default_factory=dict)
    """steps by slot"""

    def __call__(self, session: Session) -> None:
        model = nn.Module()
        model.ledger = nn.ParameterList([torch.zeros(self.workers * STEPS) for _ in range(ROWS)])
        optimizer = SGD(model.parameters(), lr=1.0, maximize=True)
        session.prepare(model, optimizer, [])
        for step in range(STEPS):
            self.wait(session, step)
            optimizer.zero_grad()
            for row in model.ledger:
                assert row.grad is not None
                row.grad[session.slot * STEPS + step] = 1.0
            if self.push:
                session.push(1)
            else:
                optimizer.step()
            self.done[session.slot] = step + 1

    def held(self, job: Job, shard: int) -> torch.Tensor:
        """What a shard's rows say: (rows, pushes)."""
        replication = job.services[shard]._replication
        assert replication is not None
        rows = [stored.weights.clone() for stored in replication.shard.chunks.values()]
        return torch.stack(rows) if rows else torch.zeros(0, self.workers * STEPS)


def ledger_context(mode: str, workers: int, **others: object) -> WorkerContext:
    size = workers * STEPS * 4
    return replace(CONTEXT, mode=mode, workers=workers, shards=2, chunk_bytes=size, **others)  # type: ignore[arg-type]


def run_ledger(ledger: Ledger, context: WorkerContext, folder: Path, kills: list[tuple[int, int]]) -> Job:
    """Take a checkpoint a little later than the start, then kill shards: (which one, after how many effects)."""
    job = make_job(ledger, context)
    job.folder, job.keeps = str(folder), True
    asked = [threading.Event() for _ in kills]
    before = ledger.wait

    def wait(session: Session, step: int) -> None:
        before(session, step)
        if step >= 50 and step % 30 == 20 and step // 30 < len(asked):  # so that there is more to do when it happens
            assert asked[step // 30].wait(40)

    ledger.wait = wait
    with job.running():
        job.wait_for(lambda: len(ledger.done) == context.workers and min(ledger.done.values()) > 10, "steps")
        job.snapshot(1)
        for number, (shard, after) in enumerate(kills):
            asked[number].set()
            job.kill_shard(shard, after, 1)
    return job


VARIANTS: dict[str, dict[str, object]] = {
    "shared": {},
    "sent": {"shared_memory": False, "overlap": "off"},
    "overlap": {"shared_memory": False},
    "credit": {"shared_memory": False, "window_bytes": 1},
    "ahead": {"fetch_ahead": True},
    "every third": {"n_push": 3, "n_fetch": 3},
}


@pytest.mark.parametrize("mode", ["async", "ssp:0", "ssp:3"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("workers", [1, 3])
def test_no_push_counts_twice_and_what_was_lost_is_counted(
    mode: str, variant: str, workers: int, tmp_path: Path
) -> None:
    if mode != "async" and variant in ("ahead", "every third"):
        pytest.skip("for async only")
    draw = random.Random(f"{mode} {variant} {workers}")
    ledger = Ledger(workers)
    kills = [(draw.randrange(2), draw.randrange(24)) for _ in range(3)]
    job = run_ledger(ledger, ledger_context(mode, workers, **VARIANTS[variant]), tmp_path, kills)
    assert job.deaths >= 2
    lost = job.training.lost()
    per_push = 3 if variant == "every third" else 1
    for shard in (0, 1):
        held = ledger.held(job, shard)
        assert set(held.unique().tolist()) <= {0.0, 1.0}
        zeros = int((held == 0.0).sum())
        counted = lost[shard].contributions if shard in lost else 0
        assert zeros == counted * per_push
        if shard not in {which for which, _ in kills}:
            assert zeros == 0


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_pushes_alone_are_said_again_too(mode: str, tmp_path: Path) -> None:
    ledger = Ledger(2, push=True)
    job = run_ledger(ledger, ledger_context(mode, 2), tmp_path, [(0, 11), (1, 21), (0, 0)])
    lost = job.training.lost()
    for shard in (0, 1):
        held = ledger.held(job, shard)
        assert set(held.unique().tolist()) <= {0.0, 1.0}
        assert int((held == 0.0).sum()) == (lost[shard].contributions if shard in lost else 0)


# ---------------------------------------------------------------- workers: taken over, to the last bit


class Apart(threading.local):
    """What a worker draws from, where all workers are threads of one process."""

    generator = None

    def sow(self, first: int, _second: int, _third: int) -> None:
        if self.generator is None:
            self.generator = torch.Generator()  # type: ignore[assignment]
        self.generator.manual_seed(first)  # type: ignore[attr-defined]


class Dropout(nn.Module):
    def __init__(self, apart: Apart) -> None:
        super().__init__()
        self._apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = torch.rand(x.shape, generator=self._apart.generator, dtype=x.dtype) < 0.7
        return x * mask / 0.7


@dataclass
class Trains:
    """Three passes of Adam with dropout; ``samples`` do not come out even."""

    apart: Apart
    samples: int = 43
    norm: bool = False
    accumulate: int = 1
    results: dict[int, tuple[list[torch.Tensor], int]] = field(default_factory=dict)
    sent: int = 0
    """messages of one worker to shards"""

    def data(self) -> Dataset[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(self.samples, 6, generator=generator, dtype=torch.float64)
        return TensorDataset(x, torch.sin(x[:, :2]))

    def __call__(self, session: Session) -> None:
        norm = nn.BatchNorm1d(8) if self.norm else nn.Identity()
        model = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), Dropout(self.apart), nn.Linear(8, 2)).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.4, 0.4, generator=generator)
        optimizer = Adam(model.parameters(), lr=0.01)
        (loader,) = session.prepare(model, optimizer, [DataLoader(self.data(), batch_size=4, shuffle=True)])
        while loader.epoch < 3:
            optimizer.zero_grad()
            for number, (x, y) in enumerate(loader, 1):
                nn.functional.mse_loss(model(x), y).backward()
                if number % self.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        self.results[session.slot] = [p.detach().clone() for p in model.parameters()], session.clock


def train_with(trains: Trains, context: WorkerContext, kills: dict[int, list[int]]) -> Job:
    job = make_job(trains, context)
    job.takes_over, job.kills = True, {slot: list(after) for slot, after in kills.items()}
    with job.running():
        pass
    return job


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Apart:
    apart = Apart()
    monkeypatch.setattr(downpour.randomness, "sow", apart.sow)
    return apart


def sync_context(workers: int, **others: object) -> WorkerContext:
    return replace(CONTEXT, workers=workers, shards=2, chunk_bytes=160, **others)  # type: ignore[arg-type]


def same(calm: Trains, killed: Trains) -> None:
    for slot, (weights, clock) in calm.results.items():
        other, other_clock = killed.results[slot]
        assert clock == other_clock
        for a, b in zip(weights, other, strict=True):
            assert torch.equal(a, b), "to the last bit"


CALM: dict[str, Trains] = {}


def calm(apart: Apart, key: str, context: WorkerContext, **others: Any) -> Trains:
    """The run in which nobody dies, made once."""
    if key not in CALM:
        CALM[key] = Trains(apart, **others)
        CALM[key].sent = train_with(CALM[key], context, {}).clients[0].sent
    return CALM[key]


@pytest.mark.parametrize("part", range(20))
def test_a_worker_that_dies_anywhere_is_taken_over_to_the_last_bit(part: int, apart: Apart) -> None:
    """Before its first message, in the middle of steps, at the ends of passes, before its last."""
    context = sync_context(2, shared_memory=False, overlap="off")
    before, killed = calm(apart, "two", context), Trains(apart)
    after = (before.sent - 1) * part // 19
    job = train_with(killed, context, {part % 2: [after]})
    assert job.deaths == 1
    same(before, killed)


@pytest.mark.parametrize("back", range(2, 18, 2))
def test_a_worker_that_dies_at_its_end_is_taken_over(back: int, apart: Apart) -> None:
    context = sync_context(2, shared_memory=False, overlap="off")
    before, killed = calm(apart, "two", context), Trains(apart)
    job = train_with(killed, context, {0: [before.sent - back]})
    assert job.deaths == 1
    same(before, killed)


@pytest.mark.parametrize("seed", range(8))
def test_many_deaths_change_nothing(seed: int, apart: Apart) -> None:
    draw = random.Random(seed)
    context = sync_context(3, shared_memory=bool(seed % 2), overlap="auto" if seed % 3 else "off")
    before, killed = calm(apart, "three", replace(context, overlap="auto")), Trains(apart)
    kills = {slot: [draw.randrange(25) for _ in range(draw.randrange(1, 4))] for slot in range(3)}
    job = train_with(killed, context, kills)
    assert job.deaths >= 3
    same(before, killed)


@pytest.mark.parametrize("samples", [13, 25])
@pytest.mark.parametrize("after", range(8, 60, 6))
def test_workers_without_a_part_of_the_last_round_are_taken_over(samples: int, after: int, apart: Apart) -> None:
    context = sync_context(3)
    before, killed = calm(apart, f"uneven {samples}", context, samples=samples), Trains(apart, samples)
    train_with(killed, context, {0: [after], 1: [after + 1]})
    same(before, killed)


@pytest.mark.parametrize("after", [12, 40, 77])
def test_batches_that_were_accrued_are_drawn_again(after: int, apart: Apart) -> None:
    context = sync_context(2)
    before = calm(apart, "accrued", context, samples=48, accumulate=3)
    killed = Trains(apart, 48, accumulate=3)
    train_with(killed, context, {0: [after]})
    same(before, killed)


def test_a_sole_worker_is_taken_over_from_weights_that_lay_in_its_memory(apart: Apart) -> None:
    context = sync_context(1)
    before, killed = calm(apart, "sole", context), Trains(apart)
    assert train_with(killed, context, {0: [60, 33]}).deaths == 2
    same(before, killed)


@pytest.mark.parametrize("part", range(1, 6))
def test_with_batch_norm_the_weights_are_the_same(part: int, apart: Apart) -> None:
    """What it has gathered of its statistics since the pass began is lost with a worker; training does not use them."""
    context = sync_context(2, shared_memory=False, overlap="off")
    before = calm(apart, "norm", context, samples=48, norm=True)
    killed = Trains(apart, 48, norm=True)
    job = train_with(killed, context, {1: [before.sent * part // 6]})
    assert job.deaths == 1
    same(before, killed)


# ---------------------------------------------------------------- the end of a pass


def test_who_has_no_part_of_the_last_round_begins_the_next_pass_with_its_weights() -> None:
    """13 samples, three workers with batches of 4: the second round is one sample, of the last worker."""
    x = torch.linspace(-1, 1, 13, dtype=torch.float64).view(13, 1)

    def train(session: Session | None, batch: int) -> tuple[torch.Tensor, int]:
        model = nn.Linear(1, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer = SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(x, 3 * x + 1), batch_size=batch)
        if session is not None:
            (loader,) = session.prepare(model, optimizer, [loader])
        for _ in range(2):
            for part, wanted in loader:
                optimizer.zero_grad()
                (model(part) - wanted).square().mean().backward()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), session.clock if session else 4

    alone, clock = train(None, 12)
    job = make_job(lambda session: train(session, 4), replace(CONTEXT, workers=3))
    with job.running():
        pass
    for slot in range(3):
        weights, at = job.results[slot]  # type: ignore[misc]
        assert at == clock
        assert torch.allclose(weights, alone, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- NaN


def test_where_the_servers_leave_nan_out_the_script_goes_on_and_is_warned_once() -> None:
    def body(session: Session) -> torch.Tensor:
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        optimizer = SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        for step in range(6):
            optimizer.zero_grad()
            model(torch.full((1, 2), float("nan") if step in (1, 3) else 1.0)).sum().backward()
            optimizer.step()
        return model.weight.detach().clone()

    job = make_job(body, replace(CONTEXT, mode="async", on_nan="skip"))
    with pytest.warns(UserWarning, match="step 1: the gradient of weight holds NaN") as caught, job.running():
        pass
    assert len(caught) == 1
    assert torch.equal(job.results[0], torch.full((1, 2), -4.0))  # type: ignore[arg-type]
