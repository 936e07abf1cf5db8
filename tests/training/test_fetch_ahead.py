"""``fetch_ahead``: the answer to a push is awaited in the next step, and everything else is as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from downpour.session import Session
from downpour_common.errors import NonFiniteContribution
from harness import CONTEXT, run_job

AHEAD = replace(CONTEXT, mode="async", fetch_ahead=True, chunk_bytes=256)
STEPS = 12
LR = 0.1


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-0.3, 0.3 + index, parameter.numel()).view(parameter.shape))
    return model


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    loss = model(torch.full((4, 20), 0.1 * (step + 1))).square().mean()
    assert isinstance(loss, torch.Tensor)
    return loss


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(session: Session) -> list[torch.Tensor]:
    """The weights on which each step computed, and those at the end."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    session.prepare(model, optimizer, [])
    seen = []
    for step in range(STEPS):
        seen.append(flat(model))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    session.pull()
    return [*seen, flat(model)]


def one_step_behind() -> list[torch.Tensor]:
    """The same in one process: gradients of step k are computed on the weights before update k − 1."""
    server, replica = make_model(), make_model()
    optimizer = torch.optim.SGD(server.parameters(), lr=LR, fused=True)
    seen, before = [], flat(server)
    for step in range(STEPS):
        seen.append(flat(replica))
        replica.zero_grad()
        loss_of(replica, step).backward()
        after_last = before
        for parameter, computed in zip(server.parameters(), replica.parameters(), strict=True):
            parameter.grad = computed.grad
        optimizer.step()
        before = flat(server)
        nn.utils.vector_to_parameters(after_last, replica.parameters())
    return [*seen, flat(server)]


@pytest.mark.parametrize("shared_memory", [True, False])
def test_each_step_computes_on_the_weights_of_the_step_before(shared_memory: bool) -> None:
    job = run_job(train, replace(AHEAD, shared_memory=shared_memory, shards=2))
    found = job.results[0]
    assert isinstance(found, list)
    for ours, expected in zip(found, one_step_behind(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[0], found[1]), "the first answer is there in the second step at the earliest"


def test_a_push_says_which_version_it_was_computed_on() -> None:
    job = run_job(train, AHEAD)
    report = job.training.shards[0].report
    chunks = report["applied"] // STEPS
    assert report["staleness"] == {"0": chunks, "1": chunks * (STEPS - 1)}


def test_what_a_push_by_hand_has_awaited_is_what_the_next_step_is_computed_on() -> None:
    def body(session: Session) -> None:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        session.prepare(model, optimizer, [])
        for step in range(STEPS):
            loss_of(model, step).backward()
            optimizer.step()
            session.push(1)

    report = run_job(body, AHEAD).training.shards[0].report
    chunks = report["applied"] // (2 * STEPS)
    # A step misses the push before it, and that push, of the same gradient as the step before it, that step too.
    assert report["staleness"] == {"0": chunks, "1": chunks * STEPS, "2": chunks * (STEPS - 1)}


@pytest.mark.parametrize("shared_memory", [True, False])
def test_with_several_workers_nothing_is_lost_and_gradients_are_the_scripts_own(shared_memory: bool) -> None:
    def count(session: Session) -> torch.Tensor:
        model = nn.Linear(100, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.full((1, 100), -1.0)).sum().backward()
            optimizer.step()
            assert model.weight.grad is not None
            model.weight.grad.fill_(1e9)  # the push that is under way must not see it
        session.pull()
        session.barrier()
        session.pull()
        return model.weight.detach().clone()

    job = run_job(count, replace(AHEAD, workers=3, shards=2, shared_memory=shared_memory))
    for weights in job.results.values():
        assert isinstance(weights, torch.Tensor)
        assert torch.equal(weights, torch.full_like(weights, 60.0))


def test_the_end_of_the_script_waits_for_the_last_answer() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        model(torch.full((1, 3), float("nan"))).sum().backward()
        optimizer.step()

    with pytest.raises(NonFiniteContribution, match="step 0"):
        run_job(body, AHEAD)
