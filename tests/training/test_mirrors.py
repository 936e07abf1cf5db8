"""The GPU path's data flow, on any machine: mirrors, copies per chunk, arrival, with streams that do nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import downpour.session
from downpour import staging
from downpour.session import Session
from downpour.space import FlatSpace
from harness import CONTEXT, run_job


class IdleStream:
    """Stands for a CUDA stream or event where every copy is already done when it returns."""

    def __init__(self, *_: object) -> None:
        self.waits = 0

    def wait_stream(self, _other: object) -> None:
        self.waits += 1

    def record(self, _stream: object) -> None:
        self.waits += 1

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> list[staging.CudaStaging]:
    made: list[staging.CudaStaging] = []

    def make(space: FlatSpace) -> staging.CudaStaging:
        made.append(staging.CudaStaging(space))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", IdleStream)
    monkeypatch.setattr(torch.cuda, "Event", IdleStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", IdleStream)
    monkeypatch.setattr(staging, "_pinned", torch.empty_like)
    monkeypatch.setattr(downpour.session, "staging_for", make)
    return made


@pytest.mark.parametrize(
    ("mode", "n_push", "n_fetch"), [("sync", 1, 1), ("async", 1, 1), ("async", 2, 4), ("async", 4, 2)]
)
def test_mirrors_carry_the_same_weights(
    mirrored: list[staging.CudaStaging], mode: str, n_push: int, n_fetch: int
) -> None:
    def body(session: Session) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        session.prepare(model, optimizer, [])
        model.eval()
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(4, 40)).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    context = replace(CONTEXT, mode=mode, n_push=n_push, n_fetch=n_fetch, shards=2, shared_memory=False)
    with_mirrors: Any = run_job(body, context).results[0]
    assert mirrored
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downpour.session, "staging_for", staging.HostStaging)
        plain: Any = run_job(body, context).results[0]
    assert all(torch.equal(a, b) for a, b in zip(with_mirrors, plain, strict=True))
