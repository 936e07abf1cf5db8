"""Workers on a GPU: the same weights as one process, with pinned staging and a side stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import downpour.overlap
from downpour.session import Session
from downpour.trial import Trial
from harness import CONTEXT, run_job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.BatchNorm1d(512), nn.Linear(512, 8)).double().cuda()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    model.eval()  # BatchNorm by its running statistics, so that halves of a batch make the whole
    for step in range(len(x)):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[step]), y[step]).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("workers", [1, 2])
def test_sync_on_a_gpu_equals_one_process(workers: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 8, 256, generator=generator, dtype=torch.float64).cuda()
    y = x[..., :8].sin()
    model = make_model()
    expected = train(model, torch.optim.Adam(model.parameters(), lr=0.01), x, y)

    def body(session: Session) -> list[torch.Tensor]:
        own = make_model()
        optimizer = torch.optim.Adam(own.parameters(), lr=0.01)
        session.prepare(own, optimizer, [])
        part = slice(session.slot * 8 // workers, (session.slot + 1) * 8 // workers)
        return train(own, optimizer, x[:, part], y[:, part])

    job = run_job(body, replace(CONTEXT, workers=workers, shards=2, chunk_bytes=100_000))
    for slot in range(workers):
        result: Any = job.results[slot]
        assert max((a - b).abs().max().item() for a, b in zip(expected, result, strict=True)) <= 1e-6


def test_local_steps_and_sums_on_a_gpu() -> None:
    def body(session: Session) -> tuple[int, int]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        session.prepare(model, optimizer, [])
        x = torch.ones(4, 256, dtype=torch.float64, device="cuda")
        for _ in range(20):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        assert session._engine is not None
        return session._engine.counters.pushes, session._engine.counters.pulls

    context = replace(CONTEXT, mode="async", n_push=5, n_fetch=10)
    assert run_job(body, context).results[0] == (20 // 5, 20 // 10)


@pytest.mark.parametrize("change", ["nothing", "clipped", "past-autograd", "there-and-back"])
def test_chunks_leave_during_backward_and_change_no_result(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    class Always(Trial):
        on = property(lambda _: True, lambda _, __: None)  # type: ignore[assignment]

    monkeypatch.setattr(downpour.overlap, "Trial", Always)

    def body(session: Session) -> list[torch.Tensor]:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        session.prepare(model, optimizer, [])
        model.eval()
        generator = torch.Generator().manual_seed(5)
        for _ in range(30):
            optimizer.zero_grad()
            x = torch.randn(64, 256, generator=generator, dtype=torch.float64).cuda()
            model(x).square().mean().backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                if change == "past-autograd":
                    parameter.grad.data.mul_(0.5)
                elif change == "there-and-back":
                    parameter.grad.mul_(2.0).mul_(0.5)
            if change == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()]

    context = replace(CONTEXT, shards=2, chunk_bytes=100_000)
    job = run_job(body, context)
    overlapped: Any = job.results[0]
    plain: Any = run_job(body, replace(context, overlap="off")).results[0]
    assert all(torch.equal(a, b) for a, b in zip(overlapped, plain, strict=True))
    assert sum(shard.report["staged"] for shard in job.training.shards.values()) > 0
