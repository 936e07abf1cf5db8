"""Staleness on purpose and what helps against it, a warm start, gradients clipped: whole jobs in one process."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
import torch
from torch import nn

from downpour.session import Session
from harness import CONTEXT, Job, make_job, run_job

ASYNC = replace(CONTEXT, mode="async", chunk_bytes=1024)
LR = 0.01


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-0.3, 0.3 + index, parameter.numel()).view(parameter.shape))
    return model


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    loss = model(torch.full((4, 20), 0.1 * (step + 1))).square().mean()
    assert isinstance(loss, torch.Tensor)
    return loss


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def train(session: Session, steps: int = 10, clip: float = 0.0, model: nn.Module | None = None) -> list[torch.Tensor]:
    """The weights on which each step computed. ``clip``: by the script itself."""
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    session.prepare(model, optimizer, [])
    seen = []
    for step in range(steps):
        seen.append(flat(model))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return seen


def delayed(steps: int, late: int) -> list[torch.Tensor]:
    """What one process sees whose gradients are applied so many steps late."""
    model = make_model()
    held: deque[list[torch.Tensor]] = deque()
    seen = []
    for step in range(steps):
        seen.append(flat(model))
        model.zero_grad()
        loss_of(model, step).backward()
        held.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if len(held) > late:
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), held.popleft(), strict=True):
                    parameter.sub_(gradient, alpha=LR)
    return seen


# ---------------------------------------------------------------- staleness on purpose


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_as_many_updates_late_as_was_asked(shared: bool) -> None:
    steps, late = 14, 4
    job = run_job(lambda s: train(s, steps), replace(ASYNC, inject_staleness=late, shared_memory=shared))
    seen = job.results[0]
    assert isinstance(seen, list)
    torch.testing.assert_close(torch.stack(seen), torch.stack(delayed(steps, late)))
    staleness = job.training.staleness()
    chunks = staleness.total() // steps
    # the first ones were computed before anything was applied; those held at the end are pushed then
    assert staleness == dict.fromkeys(range(late), chunks) | {late: chunks * (steps - late)}


def digits(session: Session, steps: int) -> float:
    """The loss of a small net after so many steps on real data."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    samples, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    session.prepare(model, optimizer, [])
    drawn = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(labels), (32,), generator=drawn)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(samples[batch]), labels[batch]).backward()
        optimizer.step()
    session.pull()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(samples), labels))


@pytest.mark.parametrize(
    ("compensation", "least", "most"), [("off", 2.0, 99.0), ("stale-lr", 0.0, 1.6), ("gap", 0.0, 1.6)]
)
def test_what_stalls_when_late_learns_with_compensation(compensation: str, least: float, most: float) -> None:
    job = make_job(lambda s: digits(s, 350), replace(ASYNC, chunk_bytes=1 << 20, inject_staleness=16))
    job.compensation = compensation
    with job.running():
        pass
    loss = job.results[0]
    assert isinstance(loss, float)
    assert least < loss < most, "one process: 0.12; chance: 2.3"
    assert job.training.shards[0].report["uncompensated"] == 0


@pytest.mark.parametrize("fetch_ahead", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_what_workers_compute_on_is_known_however_they_fetch(shared: bool, fetch_ahead: bool) -> None:
    job = make_job(
        lambda s: train(s, 25), replace(ASYNC, workers=3, shards=2, shared_memory=shared, fetch_ahead=fetch_ahead)
    )
    job.compensation = "dc"
    with job.running():
        pass
    assert job.training.staleness().total() > 0
    assert all(shard.report["uncompensated"] == 0 for shard in job.training.shards.values())


# ---------------------------------------------------------------- warm start


def warm(mode: str, steps: int = 6) -> Job:
    return make_job(lambda s: begun(s, steps), replace(ASYNC, mode=mode, workers=3, warm_start=steps))


def begun(session: Session, steps: int) -> tuple[int, int]:
    """The version of the weights that the first step computes on, and the steps taken."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    session.prepare(model, optimizer, [])
    first = session.version
    for step in range(2 * steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return first, session.clock


@pytest.mark.parametrize("mode", ["async", "ssp:1"])
def test_the_others_begin_with_what_worker_0_has_learned_alone(mode: str) -> None:
    job = warm(mode)
    with job.running():
        pass
    for slot in (1, 2):
        result = job.results[slot]
        assert isinstance(result, tuple)
        assert result[0] >= 6
        assert result[1] == 12
    assert job.results[0] == (0, 12)
    if mode == "ssp:1":
        assert job.training.clock_gap_max() <= 1


def test_nobody_waits_for_a_worker_0_that_ends_before() -> None:
    def body(session: Session) -> object:
        return train(session, 2 if session.slot == 0 else 5)

    job = run_job(body, replace(ASYNC, workers=2, warm_start=1000))
    seen = job.results[1]
    assert isinstance(seen, list)
    assert len(seen) == 5


def test_nobody_waits_for_a_worker_0_that_dies_nor_if_the_job_is_to_stop() -> None:
    job = make_job(lambda s: train(s, 3), replace(ASYNC, workers=3, warm_start=1000))

    def first(session: Session) -> object:
        train(session, 1)
        job.wait_for(lambda: all(job.sessions[slot]._prepared for slot in (1, 2)), "others")
        job.sessions[1]._stop.set()
        job.wait_for(lambda: 1 in job.results, "worker that stops")
        assert 2 not in job.results
        job.clients[0].left = 0
        session.pull()  # does not come to its end
        return None

    job.body = lambda s: first(s) if s.slot == 0 else train(s, 3)
    with job.running():
        pass
    assert isinstance(job.results[2], list)


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_job_clips_as_a_script_would(mode: str) -> None:
    norm = 0.05
    context = replace(ASYNC, mode=mode)
    own = run_job(lambda s: train(s, clip=norm), context).results[0]
    jobs = run_job(train, replace(context, clip=norm)).results[0]
    free = run_job(train, context).results[0]
    assert isinstance(own, list)
    assert isinstance(jobs, list)
    assert isinstance(free, list)
    torch.testing.assert_close(torch.stack(jobs), torch.stack(own), rtol=0, atol=0)
    assert not torch.equal(jobs[-1], free[-1])
