"""``--compress`` in whole jobs: what is learnt, what travels, and that nothing is lost when a job goes on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from downpour.session import Session
from downpour_common.codecs import codec_for
from downpour_common.compression import parse_compression
from downpour_common.errors import NonFiniteContribution
from downpour_common.layout import Layout
from downpour_coordinator.snapshots import CommitSnapshot
from downpour_coordinator.training import Training
from harness import CONTEXT, Job, make_job, repeat_at_once, run_job

CODED = replace(CONTEXT, chunk_bytes=1024)
NUMEL = 600
STEPS = 12
LONG = 120
HELD = 4
CODECS = ["fp16", "bf16", "int8", "1bit", "2bit", "topk:0.1", "randomk:0.3"]


class Mixed(nn.Module):
    """Most of it in fp32, a part in fp64, which no codec touches, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
        self.weight = nn.Parameter(torch.linspace(-1, 1, NUMEL))
        self.register_buffer("mean", torch.linspace(0, 1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight - x).square().sum() + (self.wide * x[:7].double()).square().mean()


def inputs(step: int, slot: int) -> torch.Tensor:
    return torch.linspace(0.1 + slot, 1.7, NUMEL) * (1 + (step % 3) / 7)


def target() -> torch.Tensor:
    return torch.stack([inputs(step, slot) for step in range(3) for slot in range(2)]).mean(0)


def training_for(steps: int, lr: float = 0.05, momentum: float = 0.0, waits: threading.Event | None = None) -> Any:
    """``waits``: at step ``HELD``."""

    def train(session: Session) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        model = Mixed()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        session.prepare(model, optimizer, [])
        assert session._client is not None
        traffic = session._client.traffic
        sent, received = traffic.bytes_sent, traffic.bytes_received
        while session.clock < steps:
            if waits is not None and session.clock == HELD:
                assert waits.wait(30)
            optimizer.zero_grad()
            model(inputs(session.clock, session.slot)).backward()
            optimizer.step()
        moved = traffic.bytes_sent - sent, traffic.bytes_received - received
        return model.weight.detach().clone(), model.wide.detach().clone(), *moved

    return train


def make_layout(job: Job) -> Layout:
    client = job.sessions[0]._client
    assert client is not None
    return client._layout


def weights_of(job: Job, slot: int = 0) -> torch.Tensor:
    result = job.results[slot]
    assert isinstance(result, tuple)
    weight = result[0]
    assert isinstance(weight, torch.Tensor)
    return weight


@pytest.mark.parametrize(
    "codec", [pytest.param(c, marks=() if c.startswith(("int8", "topk")) else pytest.mark.long) for c in CODECS]
)
def test_what_is_encoded_both_ways_is_learnt_all_the_same(codec: str) -> None:
    context = replace(CODED, workers=2, compress=f"push={codec},pull={codec}")
    job = run_job(training_for(60, lr=0.03), context)
    found = weights_of(job)
    assert torch.equal(found, weights_of(job, 1)), "all workers of sync have the same"
    assert (found - target()).norm() < 0.25 * target().norm()
    choice = parse_compression(f"push={codec}").push
    assert choice is not None
    made, chunks = codec_for(choice), make_layout(job).by_kind["trainable"]
    each = sum(made.nbytes(c.numel) if c.dtype == "float32" else c.nbytes for c in chunks)
    result = job.results[1]  # the other one brings the first weights, and so has not fetched them
    assert isinstance(result, tuple)
    assert result[2:] == (60 * each, 60 * each), "but for the first weights, nothing whole travels"
    assert sum(c.numel for c in chunks if c.dtype == "float32") == NUMEL


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_every_worker_has_a_view_of_its_own_where_steps_do_not_meet(mode: str) -> None:
    context = replace(CODED, workers=2, shards=2, mode=mode, compress="push=topk:0.2,pull=1bit")
    job = run_job(training_for(60, lr=0.03), context)
    assert (weights_of(job) - target()).norm() < 0.35 * target().norm()


@pytest.mark.parametrize("change", [{"n_push": 2, "n_fetch": 2}, {"n_fetch": 3}, {"fetch_ahead": True}])
def test_it_goes_with_the_other_ways_to_exchange(change: dict[str, Any]) -> None:
    context = replace(CODED, mode="async", compress="push=int8,pull=topk:0.3", **change)
    found = weights_of(run_job(training_for(60, lr=0.05), context))
    assert (found - inputs(1, 0)).norm() < 0.2 * inputs(1, 0).norm()


def test_a_run_in_sync_gives_the_same_bits_again() -> None:
    context = replace(CODED, workers=2, shards=2, compress="push=topk:0.05,pull=2bit")
    first, second = (run_job(training_for(STEPS), context) for _ in range(2))
    assert torch.equal(weights_of(first), weights_of(second))


@pytest.mark.parametrize("codec", ["int8", "topk", "randomk"])
def test_what_is_not_finite_is_refused_as_ever(codec: str) -> None:
    def body(session: Session) -> None:
        model = nn.Linear(300, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        assert model.weight.grad is not None
        model.weight.grad[0, 7] = float("nan")
        optimizer.step()

    with pytest.raises(NonFiniteContribution, match="weight"):
        run_job(body, replace(CODED, compress=f"push={codec}"))


def test_what_is_left_out_spoils_no_residual() -> None:
    def train(session: Session) -> torch.Tensor:
        model = Mixed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.prepare(model, optimizer, [])
        for step in range(40):
            optimizer.zero_grad()
            model(inputs(step, 0)).backward()
            if step == 5:
                assert model.weight.grad is not None
                model.weight.grad[3] = float("inf")
            optimizer.step()
        return model.weight.detach().clone()

    with pytest.warns(UserWarning, match="NaN or Inf"):
        job = run_job(train, replace(CODED, compress="push=1bit", on_nan="skip"))
    found = job.results[0]
    assert isinstance(found, torch.Tensor)
    assert torch.isfinite(found).all()
    assert (found - inputs(1, 0)).norm() < 0.3 * inputs(1, 0).norm()


@pytest.mark.parametrize("compress", ["push=topk:0.05,pull=bf16", "push=1bit,pull=2bit"])
def test_a_job_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(
    compress: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat_at_once(monkeypatch)
    context = replace(CODED, workers=2, shards=2, compress=compress)
    whole = weights_of(run_job(training_for(LONG, momentum=0.5), context))
    asked = threading.Event()

    job = make_job(training_for(LONG, momentum=0.5, waits=asked), context)
    job.folder, job.keeps = str(tmp_path), True
    monkeypatch.setattr(job.training._snapshots, "_clock_ahead", lambda shards: LONG // 2)
    with job.running():
        job.wait_for(lambda: min((s.clock for s in job.sessions.values()), default=0) == HELD, "steps")
        job.call(lambda: job._carry_out(job.training.begin_snapshot(1, "checkpoints/1")))
        asked.set()
        job.snapshot(1)
    taken = next(s for s in job.snapshots if s.number == 1)
    assert isinstance(taken, CommitSnapshot), taken
    assert taken.manifest["clock"] == LONG // 2
    assert torch.equal(weights_of(job), whole), "a checkpoint changes nothing"
    manifest = json.loads((tmp_path / "checkpoints/1/manifest.json").read_text())
    on = make_job(training_for(LONG, momentum=0.5), context)
    facts = replace(on.training.facts, resume="checkpoints/1", clock=manifest["clock"])
    on.training, on.folder, on.keeps = Training(facts, "checkpoints/{}".format), str(tmp_path), True
    with on.running():
        pass
    assert torch.equal(weights_of(on), whole)
