"""Gradients and weights in shared memory: the same results, refused when it is not what it should be, never needed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import downpour_server.service
from downpour.session import Session
from downpour_common import messages as m
from downpour_common import sharing
from downpour_common.layout import ModelSpec, SharedLayout, TensorSpec, plan
from downpour_common.messages import Refusal
from downpour_common.modes import parse_mode
from downpour_server.effects import Attach, Reply
from downpour_server.shard import Identity, Shard
from harness import CONTEXT, run_job

MODEL = ModelSpec(
    (
        TensorSpec("a", (), (10, 3), "float32", "trainable", 0),
        TensorSpec("b", (), (7,), "float64", "trainable", 0),
        TensorSpec("mean", (), (3,), "float32", "buffer"),
    ),
    "SGD",
    ({"lr": 1.0},),
    "average",
)
LAYOUT = plan(MODEL, 1, 1 << 20)
SHARED = SharedLayout(LAYOUT)


def train(session: Session) -> tuple[list[torch.Tensor], torch.Tensor, list[bool]]:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-0.3, 0.3 + index, parameter.numel()).view(parameter.shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session.prepare(model, optimizer, [])
    gradient = torch.zeros(0)
    for step in range(12):
        optimizer.zero_grad()
        model(torch.full((4, 40), 0.1 * (step + session.slot))).square().mean().backward()
        gradient = model[0].weight.grad.clone()  # type: ignore[union-attr, operator]
        optimizer.step()
        assert torch.equal(model[0].weight.grad, gradient), "a script may look at its gradients after the step"  # type: ignore[arg-type]
    assert session._client is not None
    return [p.detach().clone() for p in model.parameters()], gradient, list(session._client._attached)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_weights_are_the_same_bit_for_bit(workers: int) -> None:
    context = replace(CONTEXT, workers=workers, shards=2, chunk_bytes=1024)
    shared: Any = run_job(train, context).results
    sent: Any = run_job(train, replace(context, shared_memory=False)).results
    assert shared[0][2] == [True, True]
    assert sent[0][2] == [False, False]
    for slot in range(workers):
        assert all(torch.equal(a, b) for a, b in zip(shared[slot][0], sent[slot][0], strict=True))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_what_a_sole_workers_script_writes_is_kept_in_place_and_replaced_otherwise(mode: str, in_place: bool) -> None:
    def body(session: Session) -> list[float]:
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(600))})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        weight = model["w"]
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step()
            seen.append(weight[599].item())
            weight.data.add_(100.0)
        session.pull()
        return [*seen, weight[0].item()]

    context = replace(CONTEXT, mode=mode, shards=2, chunk_bytes=1024, in_place=in_place)
    found = run_job(body, context).results[0]
    assert found == ([-1.0, 98.0, 197.0, 297.0] if in_place else [-1.0, -2.0, -3.0, -3.0])


@pytest.mark.parametrize("others", [{"n_fetch": 2}, {"n_push": 2}, {"n_push": 2, "n_fetch": 2}])
def test_local_steps_never_reach_the_servers(others: dict[str, int]) -> None:
    def body(session: Session) -> list[float]:
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(6))})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        for _ in range(4):
            optimizer.zero_grad()
            model["w"].sum().backward()
            optimizer.step()
        session.pull()
        return model["w"].tolist()

    assert run_job(body, replace(CONTEXT, mode="async", **others)).results[0] == [-4.0] * 6  # type: ignore[arg-type]


def test_a_shard_that_cannot_map_it_is_sent_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Any = run_job(train, replace(CONTEXT, shards=2, shared_memory=False)).results[0]
    monkeypatch.setattr(downpour_server.service.sharing, "attach", lambda *_: None)
    fallen_back: Any = run_job(train, replace(CONTEXT, shards=2)).results[0]
    assert fallen_back[2] == [False, False]
    assert all(torch.equal(a, b) for a, b in zip(sent[0], fallen_back[0], strict=True))


def test_a_system_without_it_is_sent_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "offer", lambda _layout: None)
    result: Any = run_job(train, CONTEXT).results[0]
    assert result[2] == [False]


def test_memory_is_attached_only_where_the_nonce_is() -> None:
    offered = sharing.offer(SHARED)
    assert offered is not None
    try:
        view = sharing.attach(SHARED, os.getpid(), offered.fd, offered.nonce)
        assert view is not None
        offered.view[5] = 77
        assert view[5] == 77
        assert sharing.attach(SHARED, os.getpid(), offered.fd, bytes(16)) is None
        bigger = SharedLayout(
            plan(replace(MODEL, tensors=(TensorSpec("a", (), (99,), "float32", "trainable", 0),)), 1, 64)
        )
        assert sharing.attach(bigger, os.getpid(), offered.fd, offered.nonce) is None
        assert sharing.attach(SHARED, os.getpid(), 10_000, offered.nonce) is None
        assert sharing.attach(SHARED, 1 << 30, offered.fd, offered.nonce) is None
    finally:
        offered.close_fd()


def test_memory_of_another_network_namespace_is_not_shared() -> None:
    """There, hosts are stood in for by namespaces; processes of different hosts must not meet in memory."""
    with subprocess.Popen(
        ["unshare", "-rn", "sh", "-c", "echo up; read end"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if not child.stdout.readline():
            pytest.skip("no namespaces for this user")
        assert not sharing._same_network(child.pid)
        assert sharing.attach(SHARED, child.pid, 0, bytes(16)) is None
        child.stdin.write("end\n")
    assert sharing._same_network(os.getpid())
    assert sharing._same_network(1 << 30), "that is for the attempt to open it to tell"


def test_areas_do_not_overlap() -> None:
    areas = [area for c in LAYOUT.by_kind["trainable"] for area in (SHARED.weights(c), SHARED.gradient(c))]
    areas.sort(key=lambda area: area.start)
    assert all(a.stop <= b.start for a, b in pairwise(areas))
    assert areas[-1].stop <= SHARED.nonce_at
    assert all(area.stop - area.start > 0 for area in areas)


def test_a_push_from_memory_that_is_not_attached_is_refused() -> None:
    shard = Shard(Identity("job", 0, 0), LAYOUT, parse_mode("async"), 2, 10.0)
    peer = b"peer"
    for chunk in LAYOUT.chunks:
        shard.handle(peer, m.Init(1, "job", 0, 0, chunk.index, bytes(chunk.nbytes)), 0.0)
    memory = memoryview(bytearray(SHARED.nbytes))
    shard.attached(Attach(peer, m.AttachMemory(2, "job", 0, 4, 1, 1, bytes(16), False)), memory)

    def push(slot: int, worker_epoch: int, chunk: int, seq: int) -> m.Message:
        message = m.PushPullShared(9, "job", 0, slot, worker_epoch, seq, 0, chunk, 1, (), b"")
        [effect] = shard.handle(peer, message, 0.0)
        assert isinstance(effect, Reply)
        return effect.message

    buffer = LAYOUT.by_kind["buffer"][0].index
    for refused in (push(1, 4, 0, 0), push(0, 4, buffer, 0), push(0, 4, 99, 0)):
        assert isinstance(refused, m.Refused)
        assert refused.code == Refusal.NOT_SHARED
    assert shard.stats.applied == 0
    memory[SHARED.gradient(LAYOUT.chunks[0])] = b"\0\0\x80?" * LAYOUT.chunks[0].numel  # ones
    assert push(0, 4, 0, 0) == m.WeightsShared(9, 0, 1)
    assert bytes(memory[SHARED.weights(LAYOUT.chunks[0])]) == b"\0\0\x80\xbf" * LAYOUT.chunks[0].numel
    assert push(0, 4, 0, 0) == m.WeightsShared(9, 0, 1), "a repeat is answered and not applied"
    for worker_epoch, code in ((5, Refusal.NOT_SHARED), (4, Refusal.STALE_EPOCH)):
        refused = push(0, worker_epoch, 0, 1)
        assert isinstance(refused, m.Refused)
        assert refused.code == code, "another process has memory of its own"
