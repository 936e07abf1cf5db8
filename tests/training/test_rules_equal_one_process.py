"""The rules beyond torch's element-wise ones are the same optimizer on the unsplit model, on 1 shard and on 3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import ASGD, Adadelta, Muon, Optimizer, Rprop

from downpour import optim
from downpour.session import Session
from harness import CONTEXT, run_job

STEPS, ROWS = 100, 8


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and everything else without decay and at another rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "LAMB": lambda m: optim.LAMB(groups(m), lr=0.02, weight_decay=0.1),
    "LARS": lambda m: optim.LARS(groups(m), lr=1.0, trust=0.02, weight_decay=0.01),
    "FTRL": lambda m: optim.FTRL(m.parameters(), lr=0.1, l1=1e-4, l2=0.01),
    "Lion": lambda m: optim.Lion(groups(m), lr=0.002, weight_decay=0.1),
    "MuonAdamW": lambda m: optim.MuonAdamW(m.parameters(), lr=0.02),
    "Muon": lambda m: Muon(m.parameters(), lr=0.02),
    "Adadelta": lambda m: Adadelta(m.parameters(), lr=0.5),
    "ASGD": lambda m: ASGD(m.parameters(), lr=0.05, t0=50),
    "Rprop": lambda m: Rprop(m.parameters(), lr=0.001),
}
WHOLE = {"LAMB", "LARS", "MuonAdamW", "Muon"}


def make_model(bias: bool) -> nn.Module:
    layers = nn.Linear(9, 24, bias), nn.Tanh(), nn.Linear(24, 16, bias), nn.Tanh(), nn.Linear(16, 3, bias)
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(1)  # the global one is shared by the threads of a test
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3, generator=generator)
    return model


def train(model: nn.Module, optimizer: Optimizer, rows: slice) -> list[torch.Tensor]:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        x = torch.randn(ROWS, 9, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), torch.sin(x[rows, :3] * 2)).backward()
        optimizer.step()
        schedule.step()
    return [p.detach().clone() for p in model.parameters()]


QUICK = {("LAMB", 3), ("LARS", 1), ("FTRL", 3), ("Lion", 3), ("MuonAdamW", 3)}
"""What is tried each time; everything else takes half a minute more."""
CASES = [
    pytest.param(name, shards, marks=() if (name, shards) in QUICK else pytest.mark.long)
    for name in OPTIMIZERS
    for shards in (1, 3)
    if shards == 3 or name not in ("ASGD", "Rprop")
]


@pytest.mark.parametrize(("name", "shards"), CASES)
def test_equals_the_optimizer_in_one_process(name: str, shards: int) -> None:
    # In Muon's bfloat16 the last bit of a mean of two gradients is not the last bit of the whole batch's.
    workers = 1 if name.startswith("Muon") else 2
    model = make_model(name != "Muon")
    first = [p.detach().clone() for p in model.parameters()]
    expected = train(model, OPTIMIZERS[name](model), slice(0, ROWS))
    assert any((a - b).abs().max() > 0.01 for a, b in zip(first, expected, strict=True)), "something happened"

    def body(session: Session) -> list[torch.Tensor]:
        own = make_model(name != "Muon")
        optimizer = OPTIMIZERS[name](own)
        session.prepare(own, optimizer, [])
        part = slice(session.slot * ROWS // workers, (session.slot + 1) * ROWS // workers)
        return train(own, optimizer, part)

    job = run_job(body, replace(CONTEXT, workers=workers, shards=shards, shared_memory=shards == 1))
    held = [[s.chunk for s in service._shard.chunks.values()] for service in job.services.values() if service._shard]
    assert [bool(chunks) for chunks in held] == [True] * shards
    assert all((chunk.shape is not None) == (name in WHOLE) for chunks in held for chunk in chunks if chunk.group >= 0)
    for slot in range(workers):
        result: Any = job.results[slot]
        assert max((a - b).abs().max().item() for a, b in zip(expected, result, strict=True)) <= 1e-6
