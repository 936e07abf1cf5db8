"""`sync` with n workers is one process with the n-fold batch, for every update rule and number of shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from downpour.session import Session
from harness import CONTEXT, run_job

STEPS = 50
MakeOptimizer = Callable[[nn.Module], Optimizer]


def two_groups(model: nn.Module, **decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, **decay}, {"params": others, "lr": 0.005}]


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.05),
    "momentum": lambda m: SGD(two_groups(m, weight_decay=0.01), lr=0.02, momentum=0.9, dampening=0.1),
    "nesterov": lambda m: SGD(m.parameters(), lr=0.02, momentum=0.9, nesterov=True),
    "adagrad": lambda m: Adagrad(m.parameters(), lr=0.02, lr_decay=0.01),
    "adam": lambda m: Adam(two_groups(m, weight_decay=0.01), lr=0.01, amsgrad=True),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=0.005, momentum=0.5, centered=True),
    "adamax": lambda m: Adamax(m.parameters(), lr=0.01),
    "nadam": lambda m: NAdam(m.parameters(), lr=0.01),
    "radam": lambda m: RAdam(m.parameters(), lr=0.01),
}


def make_model(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)
    generator = torch.Generator().manual_seed(1)  # the global one is shared by the threads of a test
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3, generator=generator)
    return model


def data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(STEPS, 12, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(x[..., :3] * 2).to(dtype)


def train(
    model: nn.Module, optimizer: Optimizer, x: torch.Tensor, y: torch.Tensor, schedule_lr: bool
) -> list[torch.Tensor]:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5) if schedule_lr else None
    for step in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[step]), y[step]).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 10.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_large_batch(name: str, dtype: torch.dtype, bound: float, shards: int) -> None:
    workers = 2 if shards < 3 else 3
    x, y = data(dtype)
    model = make_model(dtype)
    expected = train(model, OPTIMIZERS[name](model), x, y, True)

    def body(session: Session) -> list[torch.Tensor]:
        own = make_model(dtype)
        optimizer = OPTIMIZERS[name](own)
        session.prepare(own, optimizer, [])
        part = slice(session.slot * 12 // workers, (session.slot + 1) * 12 // workers)
        return train(own, optimizer, x[:, part], y[:, part], True)

    job = run_job(body, replace(CONTEXT, workers=workers, shards=shards, shared_memory=shards != 2))
    for slot in range(workers):
        result: Any = job.results[slot]
        worst = max((a - b).abs().max().item() for a, b in zip(expected, result, strict=True))
        assert worst <= bound
