"""Workers that join, leave and are lost while a job runs; a coordinator that is away and comes back."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset

from downpour.context import WorkerContext
from downpour.session import Session
from downpour_common.errors import PeerRefused
from downpour_coordinator.snapshots import CommitSnapshot
from harness import CONTEXT, Job, Killed, make_job, repeat_at_once

MODES = ["async", "ssp:2", "sync"]
MEETING = ["async", "ssp:50", "sync"]
"""For tests whose workers wait for each other: a tighter bound would have them wait for each other's steps as well."""
COUNT, BATCH = 240, 4


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.tensor([float(i)]) for i in range(COUNT))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repeated every two seconds is repeated at once."""
    repeat_at_once(monkeypatch)


Hook = Callable[[Session, int, int], None]


class Trainer:
    """Trains a few passes and keeps a ledger of who has trained what. ``hook(session, pass, step)`` after each step
    that is not a worker's last."""

    def __init__(self, epochs: int = 3, stream: bool = False) -> None:
        self.epochs = epochs
        self.stream = stream
        self.hook: Hook = lambda *_: None
        self.trained: dict[int, dict[int, list[int]]] = {}
        self.sizes: dict[int, dict[int, tuple[int, int]]] = {}
        self.weights: dict[int, torch.Tensor] = {}
        self.joined: dict[int, threading.Event] = {slot: threading.Event() for slot in range(9)}
        self.first_pass: dict[int, int] = {}
        self.clocks: dict[int, tuple[int, int]] = {}

    def __call__(self, session: Session) -> None:
        model = nn.Sequential(nn.Linear(1, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.4, 0.7, parameter.numel()).view(parameter.shape))
        optimizer = SGD(model.parameters(), lr=0.001)
        data: Any = Stream() if self.stream else Numbers()
        (loader,) = session.prepare(model, optimizer, [DataLoader(data, batch_size=BATCH, shuffle=not self.stream)])
        mine = self.trained.setdefault(session.slot, {})
        self.first_pass[session.slot] = loader.epoch
        first = session.clock
        self.joined[session.slot].set()
        while loader.epoch < self.epochs:
            epoch = loader.epoch
            for step, batch in enumerate(loader, 1):
                if step == 1:
                    length = 0 if self.stream else len(loader)
                    self.sizes.setdefault(session.slot, {})[epoch] = (session.workers, length)
                optimizer.zero_grad()
                (model(batch.double() / COUNT) - batch.double() / COUNT).square().mean().backward()
                mine.setdefault(epoch, []).extend(int(n) for n in batch.flatten())
                optimizer.step()
                self.hook(session, epoch, step)
        self.clocks[session.slot] = (first, session.clock)
        self.weights[session.slot] = torch.cat([p.detach().flatten() for p in model.parameters()])

    def of_pass(self, epoch: int) -> list[int]:
        """All samples trained in a pass, ascending."""
        return sorted(n for mine in self.trained.values() for n in mine.get(epoch, []))

    def run(self, context: WorkerContext, during: Callable[[Job], None] = lambda _: None) -> Job:
        job = make_job(self, context)
        with job.running():
            during(job)
        return job


def context(mode: str, workers: int = 2) -> WorkerContext:
    return replace(CONTEXT, mode=mode, workers=workers, shards=2, chunk_bytes=16)


def together(trainer: Trainer, slots: tuple[int, ...], epoch: int, step: int) -> None:
    """Have these wait for each other in the middle of a pass, so that none is through before the others have begun."""
    gate = threading.Barrier(len(slots))
    before = trainer.hook

    def hook(session: Session, at_epoch: int, at_step: int) -> None:
        if (at_epoch, at_step) == (epoch, step) and session.slot in slots and not session.context.worker_epoch:
            gate.wait(20)
        before(session, at_epoch, at_step)

    trainer.hook = hook


EVERYTHING = list(range(COUNT))

# ---------------------------------------------------------------- joining


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_a_late_joiner_shares_the_rest_of_the_pass(mode: str) -> None:
    trainer = Trainer()

    def hook(session: Session, epoch: int, step: int) -> None:
        if (epoch, step) == (0, 5) and session.slot < 2:
            assert trainer.joined[2].wait(20)

    trainer.hook = hook

    def during(job: Job) -> None:
        job.wait_for(lambda: len(trainer.trained.get(0, {}).get(0, [])) >= 8, "steps")
        job.start_worker(2)

    trainer.run(context(mode), during)
    assert [trainer.of_pass(epoch) for epoch in range(3)] == [EVERYTHING] * 3
    assert trainer.first_pass[2] == 0
    assert trainer.trained[2][0], "it had its part of the pass under way"
    assert trainer.sizes[0][0] == (2, 30)
    assert trainer.sizes[0][1] == (3, 20)


def test_in_sync_a_joiner_comes_in_with_the_next_pass() -> None:
    trainer = Trainer(4)
    holding = threading.Event()

    def hook(session: Session, epoch: int, step: int) -> None:
        if (epoch, step) == (1, 3):
            assert holding.wait(20)

    trainer.hook = hook

    def during(job: Job) -> None:
        job.wait_for(lambda: 1 in trainer.trained.get(0, {}), "second pass")
        job.start_worker(2)
        job.start_worker(5)
        job.wait_for(lambda: len(job.training._waiting) == 2, "registrations")
        assert not trainer.joined[2].is_set()
        holding.set()

    trainer.run(context("sync"), during)
    assert [trainer.of_pass(epoch) for epoch in range(4)] == [EVERYTHING] * 4
    assert trainer.first_pass == {0: 0, 1: 0, 2: 2, 5: 2}
    assert trainer.sizes[0] == {0: (2, 30), 1: (2, 30), 2: (4, 15), 3: (4, 15)}
    assert trainer.sizes[5] == {2: (4, 15), 3: (4, 15)}
    assert trainer.clocks == {0: (0, 90), 1: (0, 90), 2: (60, 90), 5: (60, 90)}
    for slot in (1, 2, 5):
        assert torch.equal(trainer.weights[slot], trainer.weights[0]), "all go in lock-step"


def test_a_stream_is_split_among_those_who_begin_the_pass() -> None:
    trainer = Trainer(2, stream=True)
    holding = threading.Event()
    trainer.hook = lambda _s, epoch, step: None if (epoch, step) != (0, 3) else _held(holding)

    def during(job: Job) -> None:
        job.wait_for(lambda: 0 in trainer.trained.get(0, {}), "steps")
        job.start_worker(2)
        job.wait_for(lambda: bool(job.training._waiting), "registration")
        holding.set()

    trainer.run(context("sync"), during)
    assert [trainer.of_pass(epoch) for epoch in range(2)] == [EVERYTHING] * 2
    assert trainer.trained[2] == {1: EVERYTHING[2::3]}


def _held(event: threading.Event) -> None:
    assert event.wait(20)


def test_one_who_joins_finds_the_others_at_the_barrier() -> None:
    def body(session: Session) -> None:
        session.prepare(nn.Linear(1, 1), None, [])
        if session.slot < 2:
            for _ in range(3):
                session.barrier()
            joined.wait(20)
        else:
            joined.set()
        session.barrier()

    joined = threading.Event()
    job = make_job(body, context("async"))
    with job.running():
        job.wait_for(lambda: job.training.begun, "start")
        job.start_worker(2)


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("mode", ["async", "ssp:50"])
def test_what_a_leaver_has_not_trained_is_trained_by_the_others(mode: str) -> None:
    trainer = Trainer()
    together(trainer, (0, 1, 2), 1, 2)

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 1 and (epoch, step) == (1, 3):
            session.drain.ask()
        if session.slot != 1 and (epoch, step) == (1, 4):
            left.wait(20)

    left = threading.Event()
    before = trainer.hook
    trainer.hook = lambda *at: (before(*at), hook(*at))[-1]  # type: ignore[func-returns-value]

    def during(job: Job) -> None:
        job.wait_for(lambda: job.training.workers[1].gone, "goodbye")
        left.set()

    job = trainer.run(context(mode, 3), during)
    assert [trainer.of_pass(epoch) for epoch in range(3)] == [EVERYTHING] * 3
    assert len(trainer.trained[1][1]) == 4 * BATCH, "the step under way was completed"
    assert 2 not in trainer.trained[1]
    assert job.training.workers[1].drained
    assert not job.training.workers[0].drained
    assert job.training.torn == 0


@pytest.mark.parametrize("shared", [True, False])
def test_in_sync_the_leavers_part_of_the_pass_is_torn_and_counted(shared: bool) -> None:
    trainer = Trainer()

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 0 and (epoch, step) == (1, 3):
            session.drain.ask()

    trainer.hook = hook
    job = trainer.run(replace(context("sync", 3), shared_memory=shared))
    assert trainer.of_pass(0) == trainer.of_pass(2) == EVERYTHING
    assert len(trainer.of_pass(1)) + job.training.torn == COUNT
    assert len(trainer.trained[0][1]) == 4 * BATCH
    assert job.training.torn == COUNT // 3 - 4 * BATCH
    assert trainer.sizes[1] == {0: (3, 20), 1: (3, 20), 2: (2, 30)}
    assert torch.equal(trainer.weights[1], trainer.weights[2])
    assert job.sessions[1].is_chief, "the next one is the chief"


def test_in_sync_one_that_leaves_between_passes_counts_the_part_that_it_would_have_had() -> None:
    """It is asked while it waits for the others to end the pass."""
    trainer = Trainer()
    waiting = threading.Event()

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 1 and (epoch, step) == (0, 30):
            assert waiting.wait(20)

    trainer.hook = hook

    def during(job: Job) -> None:
        job.wait_for(lambda: len(trainer.trained.get(0, {}).get(0, [])) == COUNT // 2, "all steps of worker 0")
        job.sessions[0].drain.ask()
        waiting.set()

    job = trainer.run(context("sync"), during)
    assert trainer.of_pass(0) == EVERYTHING
    assert 1 not in trainer.trained[0]
    assert len(trainer.of_pass(1)) + job.training.torn == COUNT
    assert trainer.of_pass(2) == EVERYTHING


def test_in_sync_one_that_leaves_when_the_others_have_begun_a_pass_counts_its_whole_part() -> None:
    trainer = Trainer()

    def during(job: Job) -> None:
        session = job.sessions[0]
        ends = session.pass_ends

        def pass_ends(loader: int, epoch: int, batches: int) -> None:
            ends(loader, epoch, batches)
            job.wait_for(lambda: (0, 1) in job.training._data.splits, "second pass of the other")
            session.drain.ask()

        session.pass_ends = pass_ends  # type: ignore[method-assign]

    job = trainer.run(context("sync"), during)
    assert 1 not in trainer.trained[0]
    assert job.training.torn == COUNT // 2
    assert len(trainer.of_pass(1)) == COUNT // 2
    assert trainer.of_pass(2) == EVERYTHING


def test_a_barrier_can_be_left() -> None:
    def body(session: Session) -> None:
        session.prepare(nn.Linear(1, 1), None, [])
        if session.slot == 1:
            left.wait(20)
        session.barrier()
        assert session.slot == 1

    left = threading.Event()
    job = make_job(body, context("async"))
    with job.running():
        job.wait_for(lambda: bool(job.training._barriers), "barrier")
        job.sessions[0].drain.ask()
        job.wait_for(lambda: job.training.workers[0].gone, "goodbye")
        left.set()
    assert job.training.workers[0].drained


def test_accrued_gradients_are_pushed_before_a_worker_leaves() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        for step in range(100):
            optimizer.zero_grad()
            model(torch.ones(1, 1)).sum().backward()
            if step == 6:
                session.drain.ask()
            optimizer.step()

    job = make_job(body, replace(CONTEXT, mode="async", n_push=5, n_fetch=5))
    with job.running():
        pass
    progress = job.training.workers[0].progress
    assert progress is not None
    assert (progress.clock, progress.pushes) == (7, 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_script_that_polls_should_stop_ends_by_itself_and_has_been_drained_all_the_same(mode: str) -> None:
    def body(session: Session) -> str:
        session.prepare(nn.Linear(1, 1), None, [])
        while not session.should_stop():
            threading.Event().wait(0.001)
        return "ended well"

    job = make_job(body, context(mode, 1))
    with job.running():
        job.wait_for(lambda: job.training.begun, "start")
        job.sessions[0].drain.ask()
    assert job.results == {0: "ended well"}
    assert job.training.workers[0].drained


# ---------------------------------------------------------------- being lost


@pytest.mark.parametrize("mode", MEETING)
def test_the_others_go_on_without_a_worker_that_is_killed(mode: str) -> None:
    trainer = Trainer()

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 1 and (epoch, step) == (1, 3):
            raise Killed

    trainer.hook = hook
    together(trainer, (0, 1, 2), 1, 2)
    job = trainer.run(context(mode, 3))
    assert trainer.of_pass(0) == trainer.of_pass(2) == EVERYTHING
    if mode == "sync":
        assert torch.equal(trainer.weights[0], trainer.weights[2])
    assert job.training.workers[1].gone


@pytest.mark.parametrize("mode", MEETING)
def test_a_replacement_takes_the_place_of_a_worker_that_was_killed(mode: str) -> None:
    trainer = Trainer(5)

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 1 and (epoch, step) == (1, 3) and not session.context.worker_epoch:
            trainer.joined[1].clear()
            raise Killed
        if session.slot != 1 and (epoch, step) == (2, 3):
            if mode == "sync":
                job.wait_for(lambda: bool(job.training._waiting) or trainer.joined[1].is_set(), "registration")
            else:
                assert trainer.joined[1].wait(20)

    trainer.hook = hook
    together(trainer, (0, 1, 2), 1, 2)
    job = make_job(trainer, context(mode, 3))
    with job.running():
        job.wait_for(lambda: job.training.workers[1].gone, "loss")
        job.start_worker(1, epoch=1)
    assert trainer.of_pass(3) == trainer.of_pass(4) == EVERYTHING
    assert trainer.trained[1][4], "it works"
    assert job.training.workers[1].epoch == 1
    if mode == "sync":
        assert torch.equal(trainer.weights[0], trainer.weights[1])
        assert torch.equal(trainer.weights[0], trainer.weights[2])


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_that_was_given_up_is_told_so(mode: str) -> None:
    trainer = Trainer()
    given_up = threading.Event()

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 1 and (epoch, step) == (0, 3):
            assert given_up.wait(20)

    trainer.hook = hook

    def during(job: Job) -> None:
        job.wait_for(lambda: len(trainer.trained.get(1, {}).get(0, [])) >= 3 * BATCH, "steps")
        job.lose(1)
        job.call(lambda: job.training.expect(1, 1))
        job.call(lambda: None)
        given_up.set()

    with pytest.raises(PeerRefused, match=r"worker/1.*must end"):
        trainer.run(context(mode), during)
    assert trainer.clocks[0][1] > 0, "the other went on to its end"


# ---------------------------------------------------------------- a coordinator that is away


def passes(mode: str, workers: int, loss: float) -> tuple[Trainer, Job]:
    """Three passes; with ``loss`` much is lost to and from the coordinator, which is restarted twice besides."""
    trainer = Trainer(3)
    trainer.hook = lambda session, epoch, step: session.log({"loss": float(step)}) if step % 5 == 0 else None
    job = make_job(trainer, context(mode, workers))
    job.loss = loss
    with job.running():
        if loss:
            for epoch in (0, 1):
                job.wait_for(lambda epoch=epoch: epoch in trainer.trained.get(0, {}), "pass")  # type: ignore[misc]
                job.restart_coordinator()
    return trainer, job


@pytest.mark.parametrize("mode", MODES)
def test_what_is_lost_around_a_restart_of_the_coordinator_changes_nothing(mode: str) -> None:
    calm, _ = passes(mode, 2, 0.0)
    trainer, job = passes(mode, 2, 0.3)
    assert job.lost > 20
    assert [trainer.of_pass(epoch) for epoch in range(3)] == [EVERYTHING] * 3
    assert all(w.gone for w in job.training.workers.values())
    steps = sum(clock for _, clock in trainer.clocks.values())
    assert steps == 3 * COUNT // BATCH
    if mode == "sync":
        assert torch.equal(trainer.weights[0], calm.weights[0]), "to the last bit"
        rows = sorted((row["worker"], row["clock"]) for row in job.rows)
        assert rows == [(slot, clock) for slot in (0, 1) for clock in range(5, 91, 5)], "each line once"


@pytest.mark.parametrize("mode", MEETING)
def test_workers_join_and_leave_while_much_is_lost(mode: str) -> None:
    trainer = Trainer(4)

    def hook(session: Session, epoch: int, step: int) -> None:
        if session.slot == 0 and (epoch, step) == (2, 3):
            session.drain.ask()
        if session.slot == 1 and (epoch, step) == (1, 2):
            job.wait_for(lambda: bool(job.training._waiting) or trainer.joined[2].is_set(), "registration")

    trainer.hook = hook
    together(trainer, (0, 1), 1, 1)
    job = make_job(trainer, context(mode))
    with job.running():
        job.loss = 0.3
        job.wait_for(lambda: 1 in trainer.trained.get(0, {}), "second pass")
        job.start_worker(2)
        job.restart_coordinator()
    assert [trainer.of_pass(epoch) for epoch in (0, 1, 3)] == [EVERYTHING] * 3
    assert trainer.trained[2]
    if mode == "sync":
        assert len(trainer.of_pass(2)) + job.training.torn == COUNT
        assert torch.equal(trainer.weights[1], trainer.weights[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_snapshots_reach_the_coordinators_host_whatever_is_lost(mode: str, loss: float, tmp_path: Path) -> None:
    trainer = Trainer(1)
    holding = threading.Event()
    held: list[int] = []
    trainer.hook = lambda session, _e, step: (held.append(session.slot), _held(holding))[1] if step == 3 else None
    job = make_job(trainer, context(mode))
    job.folder = str(tmp_path)
    with job.running():
        job.wait_for(lambda: len(held) == 2, "steps")
        job.loss = loss
        job.snapshot(1, final=True)
        holding.set()
    committed = job.snapshots[-1]
    assert isinstance(committed, CommitSnapshot), committed
    assert [f["file"] for f in committed.manifest["files"]] == ["shard-0.safetensors", "shard-1.safetensors"]
    for file in committed.manifest["files"]:
        data = bytes(job.files[1, file["file"]])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert not list(tmp_path.rglob("*.safetensors"))
