"""Ranks of replicas and the servers: each moves its own part, and anybody can put the whole model together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from downpour.client.parameters import ParameterClient
from downpour.engine import Engine
from downpour.exchange import StateExchange
from downpour.session import Session
from downpour.space import FlatSpace
from downpour.staging import staging_for
from downpour_common import sharing
from downpour_common.layout import ModelSpec, Part, SharedLayout, TensorSpec, plan
from harness import CONTEXT, run_job

ROWS, COLUMNS, STEPS = 6, 50, 5
WHOLE = torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS)
TARGET = torch.linspace(2, -3, ROWS * COLUMNS).view(ROWS, COLUMNS)
OPTIONS = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
RANGES = (((0, 10), (30, 50)), ((10, 30),))
"""Columns of the whole matrix that each rank has."""


def spec() -> ModelSpec:
    tensors = []
    for rank, ranges in enumerate(RANGES):
        part = Part((ROWS, COLUMNS), 1, ranges)
        tensors.append(TensorSpec("w", (), part.local_shape, "float32", "trainable", 0, rank, part))
    tensors.append(TensorSpec("mean", (), (3,), "float32", "buffer", cell=1))
    return ModelSpec(tuple(tensors), "Adam", (OPTIONS,), "average", len(RANGES))


def columns(whole: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([whole[:, a:b] for a, b in RANGES[rank]], 1)


def expected(workers: float) -> torch.Tensor:
    weight = nn.Parameter(WHOLE.clone())
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (weight - TARGET * workers).square().sum().backward()
        optimizer.step()
    return weight.detach()


def train(session: Session) -> Any:
    """As a session does for a rank of two, without the collectives between the ranks."""
    c, described = session.context, spec()
    rank = c.rank
    welcome = session._control.register(described)
    layout = plan(described, c.shards, c.chunk_bytes)
    chief = c.replica == 0
    weight = nn.Parameter(columns(WHOLE, rank) if chief else torch.zeros(columns(WHOLE, rank).shape))
    tensors: dict[str, torch.Tensor] = {"w": weight}
    if rank == 1:
        tensors["mean"] = torch.full((3,), float(c.replica)) if not chief else torch.zeros(3)
    offered = sharing.offer(SharedLayout(layout, rank)) if c.shared_memory else None
    assert (offered is None) != c.shared_memory
    space = FlatSpace(layout, tensors, torch.device("cpu"), offered.view if offered else None, rank)
    assert sum(flat.nbytes for flat in space.weights.values()) == weight.nbytes
    staging = staging_for(space)
    client = session._client = ParameterClient(session._thread, c, layout, welcome.shards, staging)
    exchange = session._exchange = StateExchange(c, space, staging, client, lambda: chief)
    begins = exchange.start(welcome.restored)
    assert torch.equal(weight, columns(WHOLE, rank))
    if offered:
        client.share(offered, True)
        assert all(client._attached)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    engine = session._engine = Engine(space, staging, client, optimizer, (1, 1), begins.seq, begins.seq, lambda: ())
    before = client.traffic.bytes_sent
    for _ in range(STEPS):
        engine.zero_gradients()
        (weight - columns(TARGET, rank) * (c.replica + 0.5)).square().sum().backward()
        engine.step(lambda: None)
    assert client.traffic.bytes_sent - before == STEPS * weight.nbytes
    if rank == 1:
        tensors["mean"].fill_(c.replica + 1.0)
    exchange.push_buffers()
    client.end_epoch(0, 0, lambda: None)
    exchange.pull_buffers()
    own = weight.detach().clone()
    versions = client.fetched()
    whole = client.pull_whole()
    assert client.fetched() == versions
    assert torch.equal(weight, own)
    session._prepared = True
    return own, whole, tensors.get("mean")


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_train_their_parts_as_one_process_would_the_whole(shared: bool) -> None:
    context = replace(CONTEXT, workers=4, shards=2, chunk_bytes=256, widths=(2,), shared_memory=shared)
    results: Any = run_job(train, context).results
    wanted = expected(1.0)  # the mean of targets times 0.5 and 1.5
    for slot, (own, whole, mean) in results.items():
        assert torch.allclose(own, columns(wanted, slot % 2), atol=1e-6)
        assert torch.allclose(whole["w"], wanted, atol=1e-6)
        assert torch.equal(columns(whole["w"], slot % 2), own)
        assert whole["mean"].tolist() == [1.5] * 3, "the mean over the ranks that have it"
        assert mean is None or mean.tolist() == [1.5] * 3


@pytest.mark.parametrize("others", [{}, {"in_place": False}, {"shared_memory": False}, {"workers": 2}])
def test_an_unsplit_model_can_be_pulled_as_a_whole(others: dict[str, Any]) -> None:
    def body(session: Session) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 2))
        for index, parameter in enumerate(model.parameters()):
            nn.init.constant_(parameter, 0.1 * index)
        model[0].weight.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        session.prepare(model, optimizer, [])
        for step in range(3):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 160).view(4, 40) * (step + 1)).square().mean().backward()
            optimizer.step()
        assert session._client is not None
        whole = session._client.pull_whole()
        assert set(whole) == set(model.state_dict())
        for name, parameter in model.named_parameters():
            assert torch.equal(whole[name], parameter), name
        return whole

    run_job(body, replace(CONTEXT, shards=2, **others))
