"""``push_dtype=bfloat16``: fp32 gradients are rounded once and travel at half the size; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from downpour.session import Session
from downpour_common.errors import NonFiniteContribution
from harness import CONTEXT, run_job

ROUNDED = replace(CONTEXT, push_dtype="bfloat16", chunk_bytes=256)
STEPS = 8
LR = 0.1


class TwoDtypes(nn.Module):
    """Most of it in fp32, a part in fp64, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
        self.weight = nn.Parameter(torch.linspace(-1, 1, 300))
        self.register_buffer("mean", torch.linspace(0, 1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).square().mean() + (self.wide * x[:7].double()).square().mean()


def inputs(step: int, slot: int) -> torch.Tensor:
    return torch.linspace(0.1 + slot, 1.7, 300) * (1 + step / 7)


def train(session: Session) -> tuple[torch.Tensor, torch.Tensor, int]:
    model = TwoDtypes()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    session.prepare(model, optimizer, [])
    assert session._client is not None
    before = session._client.traffic.bytes_sent
    for step in range(STEPS):
        optimizer.zero_grad()
        model(inputs(step, session.slot)).backward()
        optimizer.step()
    sent = session._client.traffic.bytes_sent - before
    session.pull()
    return model.weight.detach().clone(), model.wide.detach().clone(), sent


def alone(workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In one process: the mean of gradients that are rounded one by one."""
    model = TwoDtypes()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        gradients = []
        for slot in range(workers):
            model.zero_grad()
            model(inputs(step, slot)).backward()
            assert model.weight.grad is not None
            assert model.wide.grad is not None
            gradients.append((model.weight.grad.bfloat16().float(), model.wide.grad.clone()))
        model.weight.grad = torch.stack([g for g, _ in gradients]).mean(0)
        model.wide.grad = torch.stack([g for _, g in gradients]).mean(0)
        optimizer.step()
    return model.weight.detach(), model.wide.detach()


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("workers", [1, 2])
def test_gradients_are_rounded_and_weights_are_not(workers: int, overlap: str) -> None:
    job = run_job(train, replace(ROUNDED, workers=workers, shards=2, overlap=overlap))
    weight, wide = alone(workers)
    for result in job.results.values():
        assert isinstance(result, tuple)
        torch.testing.assert_close(result[0], weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result[1], wide, rtol=1e-12, atol=1e-12)
    assert not torch.equal(weight, weight.bfloat16().float())


def test_half_as_many_bytes_are_sent() -> None:
    result = run_job(train, replace(ROUNDED, overlap="off")).results[0]
    assert isinstance(result, tuple)
    assert result[2] == STEPS * (300 * 2 + 7 * 8)


@pytest.mark.parametrize("change", [{"n_push": 2, "n_fetch": 2}, {"fetch_ahead": True}])
def test_it_goes_with_the_other_ways_to_push(change: dict[str, int]) -> None:
    exact = run_job(train, replace(ROUNDED, mode="async", push_dtype="same", **change)).results[0]  # type: ignore[arg-type]
    rounded = run_job(train, replace(ROUNDED, mode="async", **change)).results[0]  # type: ignore[arg-type]
    assert isinstance(exact, tuple)
    assert isinstance(rounded, tuple)
    torch.testing.assert_close(rounded[0], exact[0], rtol=1e-2, atol=1e-3)
    assert not torch.equal(rounded[0], exact[0])
    assert torch.equal(rounded[1], exact[1]), "fp64 is not touched"


def test_what_is_too_large_for_bfloat16_is_refused_as_infinite() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        assert model.weight.grad is not None
        model.weight.grad.fill_(torch.finfo(torch.float32).max)
        optimizer.step()

    with pytest.raises(NonFiniteContribution):
        run_job(body, ROUNDED)
