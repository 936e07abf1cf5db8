"""What each mode promises, on whole jobs."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from downpour.session import Session
from harness import CONTEXT, run_job


def linear(width: int = 6) -> nn.Module:
    model = nn.Linear(width, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, width).view(1, -1))
    return model


def loss_of(model: nn.Module, step: int, slot: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * slot + step)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    loss: torch.Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def train(session: Session, steps: int, lr: float) -> torch.Tensor:
    model = linear()
    optimizer = SGD(model.parameters(), lr=lr)
    session.prepare(model, optimizer, [])
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step, session.slot).backward()
        optimizer.step()
    return next(model.parameters()).detach().clone()


def test_async_pushes_and_fetches_as_often_as_the_paper_says() -> None:
    def body(session: Session) -> tuple[int, int, int]:
        train(session, 1000, 0.001)
        assert session._engine is not None
        counters = session._engine.counters
        return counters.pushes, counters.pulls, counters.clock

    job = run_job(body, replace(CONTEXT, mode="async", workers=2, n_push=5, n_fetch=10))
    assert job.results == {0: (200, 100, 1000), 1: (200, 100, 1000)}


def test_async_pushes_the_rest_at_the_end() -> None:
    def body(session: Session) -> None:
        train(session, 7, 0.001)

    job = run_job(body, replace(CONTEXT, mode="async", n_push=5, n_fetch=5))
    progress = job.training.workers[0].progress
    assert progress is not None
    assert progress.pushes == 2


def test_local_steps_use_the_scripts_own_optimizer() -> None:
    """With nothing fetched, one worker's weights are those of the plain loop."""
    model = linear()
    optimizer = Adam(model.parameters(), lr=0.01)
    for step in range(9):
        optimizer.zero_grad()
        loss_of(model, step, 0).backward()
        optimizer.step()
    expected = next(model.parameters()).detach()

    def body(session: Session) -> torch.Tensor:
        own = linear()
        adam = Adam(own.parameters(), lr=0.01)
        session.prepare(own, adam, [])
        for step in range(9):
            adam.zero_grad()
            loss_of(own, step, 0).backward()
            adam.step()
        return next(own.parameters()).detach().clone()

    result: Any = run_job(body, replace(CONTEXT, mode="async", n_push=3, n_fetch=100)).results[0]
    assert torch.allclose(result, expected, atol=1e-7)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_ssp_bound_is_kept_and_reached(bound: int) -> None:
    clocks = {0: 0, 1: 0}
    gaps: list[int] = []
    slow_may_go = threading.Semaphore(0)

    def body(session: Session) -> None:
        model = linear()
        optimizer = SGD(model.parameters(), lr=0.01)
        session.prepare(model, optimizer, [])
        for step in range(20):
            if session.slot == 1:
                slow_may_go.acquire(timeout=20)
            optimizer.zero_grad()
            loss_of(model, step, session.slot).backward()
            optimizer.step()
            clocks[session.slot] = step + 1
            if session.slot == 0:
                gaps.append(clocks[0] - clocks[1])

    def let_the_slow_one_go() -> None:
        """One step at a time, and only once the fast one has run into the bound or is done."""
        for step in range(20):
            deadline = time.monotonic() + 20
            while clocks[0] < min(step + bound, 20) and time.monotonic() < deadline:
                threading.Event().wait(0.001)
            slow_may_go.release()

    pacer = threading.Thread(target=let_the_slow_one_go)
    pacer.start()
    job = run_job(body, replace(CONTEXT, mode=f"ssp:{bound}", workers=2, shards=2))
    pacer.join()
    measured = max(s.report["clock_gap_max"] for s in job.training.shards.values())
    assert measured == bound
    # The script's own view lags by the step whose answer the slow worker has not yet read.
    assert max(gaps) <= bound + 1


def test_ssp_0_is_sync_with_the_learning_rate_divided() -> None:
    sync: Any = run_job(lambda s: train(s, 30, 0.05), replace(CONTEXT, mode="sync", workers=2, shards=2)).results
    stale: Any = run_job(lambda s: train(s, 30, 0.025), replace(CONTEXT, mode="ssp:0", workers=2, shards=2)).results
    assert (sync[0] - stale[0]).abs().max() <= 1e-6
    assert torch.equal(stale[0], stale[1])


def test_sync_twice_is_bit_identical() -> None:
    context = replace(CONTEXT, workers=3, shards=2)
    first: Any = run_job(lambda s: train(s, 40, 0.05), context).results
    second: Any = run_job(lambda s: train(s, 40, 0.05), context).results
    assert all(torch.equal(first[slot], second[0]) for slot in range(3))


def test_a_worker_that_ends_early_does_not_hold_up_the_rounds() -> None:
    def body(session: Session) -> int:
        train(session, 5 if session.slot == 1 else 12, 0.01)
        return session.clock

    job = run_job(body, replace(CONTEXT, mode="sync", workers=2, shards=2))
    assert job.results == {0: 12, 1: 5}


def test_every_push_is_applied_exactly_once() -> None:
    """The ledger: one-hot gradients and a rule that adds them make the weights count the pushes of each worker."""

    def body(session: Session) -> None:
        model = nn.ParameterDict({"ledger": nn.Parameter(torch.zeros(3 * 100))})
        optimizer = SGD(model.parameters(), lr=1.0, maximize=True)
        session.prepare(model, optimizer, [])
        for _ in range(session.slot + 5):
            optimizer.zero_grad()
            grad = model["ledger"].grad
            assert grad is not None
            grad[session.slot * 100 : (session.slot + 1) * 100] = 1.0
            optimizer.step()
        session.barrier()
        session.pull()
        assert model["ledger"].view(3, 100).eq(torch.tensor([[5.0], [6.0], [7.0]])).all()

    run_job(body, replace(CONTEXT, mode="async", workers=3, shards=3, chunk_bytes=64))


def test_push_and_pull_by_hand() -> None:
    """A loop of another shape: gradients are sent when the script says so, and weights change when it asks."""

    def body(session: Session) -> tuple[float, float, int]:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        session.prepare(model, SGD(model.parameters(), lr=0.5), [])
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(1, 1)).sum().backward()
            session.push(4)
        before = model.weight.item()
        session.pull()
        return before, model.weight.item(), session.clock

    assert run_job(body, replace(CONTEXT, mode="async")).results[0] == (0.0, -1.5, 3)
