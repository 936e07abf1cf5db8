"""What a script may bring: any module, groups, dtypes, tied and frozen tensors, schedulers, scalers; and what not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, StepLR

from downpour.session import Session
from downpour_common.errors import ModelError, ModelMismatch, NonFiniteContribution
from harness import CONTEXT, run_job

ONE = replace(CONTEXT, workers=1, shards=2, chunk_bytes=1024)


class Zoo(nn.Module):
    """Tied weights, a frozen layer, two dtypes, buffers of two dtypes, a scalar parameter, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.fine = nn.Linear(8, 8).double()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(self.embedding(tokens)))
        hidden = self.fine(hidden.double()).float() * self.scale
        out: torch.Tensor = self.head(hidden)
        return out


def zoo() -> Zoo:
    model = Zoo()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1:
                parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


def groups(model: Zoo) -> list[dict[str, Any]]:
    tied = [model.embedding.weight]
    rest = [p for p in model.parameters() if p is not model.embedding.weight and p.requires_grad]
    return [{"params": tied, "lr": 0.02}, {"params": rest, "weight_decay": 0.01}]


def train_zoo(model: Zoo, optimizer: torch.optim.Optimizer, steps: int = 12) -> dict[str, torch.Tensor]:
    tokens = torch.arange(10)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_one_worker_equals_the_plain_loop() -> None:
    model = zoo()
    expected = train_zoo(model, Adam(groups(model), lr=0.01))

    def body(session: Session) -> dict[str, torch.Tensor]:
        own = zoo()
        optimizer = Adam(groups(own), lr=0.01)
        session.prepare(own, optimizer, [])
        return train_zoo(own, optimizer)

    result: Any = run_job(body, ONE).results[0]
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(value, result[name], atol=1e-6), name


def test_workers_start_from_the_chiefs_tensors_frozen_and_buffers_included() -> None:
    def body(session: Session) -> dict[str, torch.Tensor]:
        own = zoo()
        with torch.no_grad():
            for tensor in [*own.parameters(), *own.buffers()]:
                tensor.add_(session.slot)
        session.prepare(own, SGD(groups(own), lr=0.1), [])
        return {name: value.detach().clone() for name, value in own.state_dict().items()}

    results: Any = run_job(body, replace(ONE, workers=2)).results
    expected = zoo().state_dict()
    for slot in (0, 1):
        assert all(torch.equal(results[slot][name], value) for name, value in expected.items())


@pytest.mark.parametrize("before", [True, False], ids=["scheduler-before-prepare", "scheduler-after"])
@pytest.mark.parametrize("make", [lambda o: StepLR(o, 3, 0.5), lambda o: LambdaLR(o, lambda k: 1 / (k + 1))])
def test_schedulers_reach_the_servers(before: bool, make: Callable[[Any], Any]) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> torch.Tensor:
        for step in range(9):
            optimizer.zero_grad()
            model(torch.full((1, 4), 0.1 * step)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
        return next(model.parameters()).detach().clone()

    def fresh() -> nn.Module:
        model = nn.Linear(4, 2)
        with torch.no_grad():
            model.weight.fill_(0.3)
            model.bias.fill_(0.1)
        return model

    model = fresh()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = loop(model, optimizer, make(optimizer))

    def body(session: Session) -> torch.Tensor:
        own = fresh()
        sgd = SGD(own.parameters(), lr=0.1, momentum=0.9)
        scheduler = make(sgd) if before else None
        session.prepare(own, sgd, [])
        return loop(own, sgd, scheduler or make(sgd))

    result: Any = run_job(body, ONE).results[0]
    assert torch.allclose(result, expected, atol=1e-6)


def test_gradient_scaler_accumulation_and_step_hooks() -> None:
    hooked: list[int] = []

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        optimizer.register_step_post_hook(lambda *_: hooked.append(1))
        for step in range(4):
            model.zero_grad()  # the module's, which sets gradients to None
            for part in range(3):
                x = torch.full((2, 4), 0.1 * (step + part))
                scaler.scale(model(x).square().mean() / 3).backward()
            scaler.step(optimizer)
            scaler.update()
        return next(model.parameters()).detach().clone()

    def fresh() -> nn.Module:
        model = nn.Linear(4, 1)
        nn.init.constant_(model.weight, 0.2)
        nn.init.constant_(model.bias, 0.1)
        return model

    model = fresh()
    expected = loop(model, SGD(model.parameters(), lr=0.1, fused=True))
    hooked.clear()

    def body(session: Session) -> torch.Tensor:
        own = fresh()
        optimizer = SGD(own.parameters(), lr=0.1, fused=True)
        session.prepare(own, optimizer, [])
        return loop(own, optimizer)

    result: Any = run_job(body, ONE).results[0]
    assert torch.allclose(result, expected, atol=1e-6)
    assert len(hooked) == 4


@pytest.mark.parametrize(("rule", "expected"), [("average", [1.0, 1.0]), ("chief", [0.5, 0.5]), ("local", [0.5, 1.5])])
def test_buffers_follow_the_jobs_rule(rule: str, expected: list[float]) -> None:
    def body(session: Session) -> float:
        model = nn.BatchNorm1d(2, momentum=1.0)
        optimizer = SGD(model.parameters(), lr=0.0)
        x = torch.tensor([[0.0, 0.0], [1.0, 1.0]]) + session.slot
        loader = torch.utils.data.DataLoader([x, x], batch_size=None)
        session.prepare(model, optimizer, [])
        model(x).sum().backward()
        session.pass_begins(0, 0)
        optimizer.step()
        session.pass_ends(0, 0, len(loader))
        assert model.running_mean is not None
        return float(model.running_mean[0])

    job = run_job(body, replace(ONE, workers=2, mode="sync", buffers=rule))
    assert [job.results[slot] for slot in (0, 1)] == expected


def refused(make: Callable[[Session], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run_job(make, ONE)


def test_closures_are_refused() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(2, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer, [])
        optimizer.step(lambda: 0.0)

    refused(body, ModelError, "closure")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS needs the loss of all data again and again"),
        (lambda m: torch.optim.Adafactor(m.parameters()), "Adafactor has no update rule"),
        (lambda m: type("Mine", (SGD,), {})(m.parameters(), lr=0.1), "Mine has no update rule"),
        (lambda m: SGD([nn.Parameter(torch.ones(2))], lr=0.1), "that the model given to prepare does not have"),
        (lambda m: SGD(m.requires_grad_(False).parameters(), lr=0.1), "nothing to train"),
        (lambda m: SGD(m.parameters(), lr=0.1, differentiable=True), "differentiable"),
        (lambda m: stepped(SGD(m.parameters(), lr=0.1, momentum=0.9)), "has state already"),
        (lambda m: stepped(Adam(m.parameters())), "has state already"),
    ],
)
def test_optimizers_that_cannot_work(make: Callable[[nn.Module], torch.optim.Optimizer], match: str) -> None:
    def body(session: Session) -> None:
        model = nn.Linear(2, 1)
        session.prepare(model, make(model), [])

    refused(body, ModelError, match)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def test_groups_cannot_be_added_later() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(2, 1)
        optimizer = SGD([model.weight], lr=0.1)
        session.prepare(model, optimizer, [])
        optimizer.add_param_group({"params": [model.bias]})

    refused(body, ModelError, "add them before")


def test_sparse_gradients_and_moved_models_are_refused() -> None:
    def sparse(session: Session) -> None:
        model = nn.Embedding(4, 2, sparse=True)
        optimizer = SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer, [])
        model.weight.grad = None
        model(torch.tensor([1])).sum().backward()
        optimizer.step()

    def moved(session: Session) -> None:
        model = nn.Linear(2, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer, [])
        model.double()
        optimizer.step()

    refused(sparse, ModelError, "sparse=False")
    refused(moved, ModelError, "before prepare")


def test_prepare_twice_is_refused() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(2, 1)
        session.prepare(model, SGD(model.parameters(), lr=0.1), [])
        session.prepare(model, SGD(model.parameters(), lr=0.1), [])

    refused(body, ModelError, "called twice")


def test_a_differing_model_is_refused_by_name() -> None:
    def body(session: Session) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1 + session.slot))
        session.prepare(model, SGD(model.parameters(), lr=0.1), [])

    with pytest.raises(ModelMismatch, match=r"expected 1\.weight .*\[1, 3\].*found 1\.weight .*\[2, 3\]"):
        run_job(body, replace(ONE, workers=2))


def test_nan_names_the_parameter_and_changes_nothing() -> None:
    def body(session: Session) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        optimizer = SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer, [])
        before = model[1].weight.detach().clone()
        model[1].weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        try:
            optimizer.step()
        finally:
            session.pull()
            assert torch.equal(model[1].weight, before)

    refused(body, NonFiniteContribution, "1.weight")


@pytest.mark.parametrize(
    "lr", [np.float32(0.05), np.float64(0.05), torch.tensor(0.05), Fraction(1, 20), Decimal("0.05")]
)
def test_learning_rates_of_any_number_type_reach_the_servers(lr: Any) -> None:
    def body(session: Session) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = SGD(model.parameters(), lr=0.7)
        session.prepare(model, optimizer, [])
        optimizer.param_groups[0]["lr"] = lr
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        return model.weight.item()

    assert run_job(body, ONE).results[0] == pytest.approx(-0.05)


def test_an_option_that_is_no_number_is_refused() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=0.7)
        session.prepare(model, optimizer, [])
        optimizer.param_groups[0]["lr"] = object()
        optimizer.step()

    refused(body, ModelError, "option lr")


class Masked(nn.Module):
    """A causal mask is a buffer full of -inf; an expanded buffer's elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("scale", torch.ones(1, 3).expand(4, 3))


def test_buffers_may_be_infinite_constant_and_expanded() -> None:
    def body(session: Session) -> tuple[torch.Tensor, torch.Tensor]:
        model = Masked()
        optimizer = SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer, [])
        session.pass_begins(0, 0)
        model.layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        session.pass_ends(0, 0, 1)
        return model.get_buffer("mask").clone(), model.get_buffer("scale").clone()

    results: Any = run_job(body, replace(ONE, workers=3, mode="sync")).results
    for slot in range(3):
        assert torch.equal(results[slot][0], torch.full((3, 3), float("-inf")).triu(1))
        assert torch.equal(results[slot][1], torch.ones(4, 3))


def test_a_parameter_unfrozen_later_is_told_and_not_ignored() -> None:
    def body(session: Session) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        model[0].requires_grad_(False)
        optimizer = SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer, [])
        model[0].requires_grad_(True)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    refused(body, ModelError, r"0\.weight was frozen")


def test_loading_weights_after_prepare_warns() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(2, 1)
        session.prepare(model, SGD(model.parameters(), lr=0.1), [])
        model.load_state_dict(model.state_dict())

    refused(body, UserWarning, "does not set the job's weights")
