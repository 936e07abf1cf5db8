"""The GPU path's data flow, on any machine: mirrors, copies per chunk, arrival, with streams that do nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import downpour.overlap
import downpour.session
from downpour import staging
from downpour.model import describe
from downpour.session import Session
from downpour.space import FlatSpace
from downpour.trial import Trial
from downpour_common.layout import plan
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

    def query(self) -> bool:
        return True


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> list[staging.CudaStaging]:
    made: list[staging.CudaStaging] = []

    def make(space: FlatSpace, rounded: bool = False) -> staging.CudaStaging:
        made.append(staging.CudaStaging(space, rounded))
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
        patch.setattr(downpour.session, "staging_for", lambda space, _rounded: staging.HostStaging(space))
        plain: Any = run_job(body, context).results[0]
    assert all(torch.equal(a, b) for a, b in zip(with_mirrors, plain, strict=True))


class Always(Trial):
    """Never compares: it is on from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True

    def ended(self, _now_s: float, _verdict: str) -> None:
        """See :class:`Trial`."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True])
def test_chunks_leave_during_backward_and_change_no_result(
    mirrored: list[staging.CudaStaging], monkeypatch: pytest.MonkeyPatch, late: bool, dtype: torch.dtype
) -> None:
    """``late``: no copy is complete before backward is over."""
    monkeypatch.setattr(downpour.overlap, "Trial", Always)
    monkeypatch.setattr(IdleStream, "query", lambda _: not late)

    def body(session: Session) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 30), nn.Linear(30, 2)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        session.prepare(model, optimizer, [])
        for step in range(9):
            optimizer.zero_grad()
            model(torch.ones(4, 40, dtype=dtype)).square().mean().backward()
            if step % 3 == 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            elif step % 3 == 2:
                model[1].weight.grad.data[3, 4] *= -1  # type: ignore[union-attr, index]
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    context = replace(CONTEXT, shards=2, shared_memory=False)
    job = run_job(body, context)
    overlapped: Any = job.results[0]
    plain: Any = run_job(body, replace(context, overlap="off")).results[0]
    assert all(torch.equal(a, b) for a, b in zip(overlapped, plain, strict=True))
    assert (sum(shard.report["staged"] for shard in job.training.shards.values()) > 0) != late
    assert all(not s._prints and not s._coming for s in mirrored)


def test_a_fingerprint_tells_small_changes(mirrored: list[staging.CudaStaging]) -> None:
    model = nn.Linear(30, 30)
    spec = describe(model, torch.optim.SGD(model.parameters(), lr=0.1), "local")
    space = FlatSpace(plan(spec.spec, 1, 1024), spec.tensors, torch.device("cpu"))
    mirror = staging.CudaStaging(space)
    [chunk, *_] = space.layout.chunks
    gradient = space.of(space.gradients, chunk)
    gradient.copy_(torch.linspace(-1, 1, chunk.numel))
    print_ = mirror._fingerprint(chunk).item()
    for index, value in ((0, 1.0), (5, -0.0), (chunk.numel - 1, 1.0000001)):
        before = gradient[index].item()
        gradient[index] = value
        assert mirror._fingerprint(chunk).item() != print_
        gradient[index] = before
    gradient[[2, 3]] = gradient[[3, 2]]
    assert mirror._fingerprint(chunk).item() != print_
    gradient[[2, 3]] = gradient[[3, 2]]
    assert mirror._fingerprint(chunk).item() == print_
    gradient.neg_()
    assert mirror._fingerprint(chunk).item() != print_
