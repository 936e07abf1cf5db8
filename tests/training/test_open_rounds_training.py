"""Rounds beside other modes, and rounds that do without the slowest, on whole jobs."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from downpour.exchange import StateExchange
from downpour.session import Session
from downpour.takeover import Beginning
from downpour_common.errors import ModelError
from harness import CONTEXT, make_job, run_job

STEPS = 8


class Words(nn.Module):
    """An embedding of which each worker uses words of its own, and a body that all share. The body's gradient does not
    depend on the embedding, so that it can be told what it should have become."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 3, dtype=torch.float64)
        self.body = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.embedding.weight.fill_(0.5)
            self.body.weight.copy_(torch.tensor([[1.0, -1.0, 0.5]]))


def optimizer_of(model: Words) -> SGD:
    body = {"params": model.body.parameters()}
    return SGD([body, {"params": model.embedding.parameters(), "lr": 1.0, "momentum": 0.0}], lr=0.1, momentum=0.9)


def loss_of(model: Words, step: int, slot: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * slot + step)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    error: torch.Tensor = (model.body(x) - x.sum(1, keepdim=True)).square().mean()
    return error + model.embedding.weight[slot].sum()


def plain(workers: int) -> torch.Tensor:
    """The body after synchronous SGD in one process."""
    model = Words()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([loss_of(model, step, slot) for slot in range(workers)]).mean().backward()
        optimizer.step()
    return model.body.weight.detach()


def body(session: Session) -> tuple[torch.Tensor, torch.Tensor]:
    model = Words()
    optimizer = optimizer_of(model)
    session.prepare(model, optimizer, [])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, session.slot).backward()
        optimizer.step()
    return model.body.weight.detach().clone(), model.embedding.weight.detach().clone()


@pytest.mark.parametrize(
    ("mode", "workers", "shards"),
    [("sync;1=async", 3, 2), ("async;0=sync", 2, 1), ("ssp:1;0=sync", 2, 2), ("sync;1=ssp:2", 1, 1)],
)
def test_the_body_is_that_of_synchronous_sgd_and_the_embedding_takes_each_push_as_it_is(
    mode: str, workers: int, shards: int
) -> None:
    """In a round, a third of each worker's change to its own words would be taken; on arrival, it is taken whole."""
    job = run_job(body, replace(CONTEXT, mode=mode, workers=workers, shards=shards, chunk_bytes=1024))
    expected = plain(workers)
    embeddings = []
    for result in job.results.values():
        assert isinstance(result, tuple)
        assert torch.allclose(result[0], expected, rtol=0, atol=1e-12), "rounds, in all workers alike"
        embeddings.append(result[1])
    newest = torch.stack(embeddings).amin(0)
    assert torch.equal(newest[:workers], torch.full((workers, 3), 0.5 - STEPS, dtype=torch.float64))
    assert torch.equal(newest[workers:], torch.full((8 - workers, 3), 0.5, dtype=torch.float64))


def test_a_group_that_the_optimizer_does_not_have_is_named() -> None:
    with pytest.raises(ModelError) as refused:
        run_job(body, replace(CONTEXT, mode="sync;1=async;3=ssp:2", timeout_s=5.0))
    text = str(refused.value)
    assert "names parameter group 3," in text
    assert "0: body.weight; 1: embedding.weight" in text


def test_a_worker_that_is_frozen_holds_nobody_up_and_what_it_gives_too_late_is_counted() -> None:
    released = threading.Event()
    others = threading.Barrier(2)

    def freezes(session: Session) -> int:
        model = Words()
        optimizer = optimizer_of(model)
        session.prepare(model, optimizer, [])
        for step in range(STEPS):
            if session.slot == 2 and step == 2:
                released.wait(20)  # until the others have ended
            optimizer.zero_grad()
            loss_of(model, step, session.slot).backward()
            optimizer.step()
        if session.slot != 2:
            others.wait(20)
            released.set()
        return session.version

    job = make_job(freezes, replace(CONTEXT, mode="sync,backup=1", workers=3, shards=2))
    with job.running():
        job.wait_for(lambda: set(job.results) >= {0, 1}, "end of those who are not frozen")
    assert job.training.late()[2] >= 1, "the gradient that it had when it was frozen"


@pytest.mark.parametrize("mode", ["sync;1=async", "average:1"])
def test_who_joins_is_in_every_round_from_then_on(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the others go between its greeting and its taking part."""
    steps, over, behind = [0, 0], threading.Event(), 3
    take_part = StateExchange.take_part

    def late(exchange: StateExchange, begins: Beginning) -> Beginning:
        if exchange._context.slot == 2:
            job.wait_for(lambda: steps[0] >= begins.seq + behind, "going on without one who has not taken part")
            taken = take_part(exchange, begins)
            assert taken.seq >= begins.seq + behind
            return taken
        return take_part(exchange, begins)

    def run(session: Session) -> list[int]:
        model = Words()
        optimizer = optimizer_of(model)
        session.prepare(model, optimizer, [])
        versions = [session.version]
        while not over.is_set():
            optimizer.zero_grad()
            loss_of(model, len(versions), session.slot).backward()
            optimizer.step()
            versions.append(session.version)
            if session.slot < 2:
                steps[session.slot] += 1
            elif len(versions) > STEPS:
                over.set()
        return versions

    monkeypatch.setattr(StateExchange, "take_part", late)
    job = make_job(run, replace(CONTEXT, mode=mode, workers=2, shards=2))
    with job.running():
        job.wait_for(lambda: steps[0] > 0, "first step")
        job.start_worker(2)
    versions = job.results[2]
    assert isinstance(versions, list)
    assert versions == list(range(versions[0], versions[0] + STEPS + 1)), "no round went by without it"
