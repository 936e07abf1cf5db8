"""Mixed precision, loss scaling, activation checkpointing and accumulation: fp32 weights, rounds in step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from downpour.activations import recompute, repeated_blocks
from downpour.lighter import Lighter
from downpour.precision import autocast_forward
from downpour.session import Session
from downpour_common.errors import NonFiniteContribution
from harness import CONTEXT, Job, run_job

CPU = torch.device("cpu")


class Block(nn.Module):
    """Dropout draws, BatchNorm counts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.body(x)


class Net(nn.Module):
    """A trunk of equal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return {"y": self.last(x), "hidden": [x, x.argmax(1)]}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """With the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


# ---------------------------------------------------------------- autocast


def test_the_forward_is_half_and_what_comes_out_is_not() -> None:
    model = made(Net)
    seen: list[torch.dtype] = []
    model.first.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    names = list(model.state_dict())
    autocast_forward(model, CPU, "bfloat16")
    out = model(torch.ones(4, 4))
    assert seen == [torch.bfloat16]
    assert out["y"].dtype == out["hidden"][0].dtype == torch.float32
    assert out["hidden"][1].dtype == torch.int64
    out["y"].sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model)(torch.ones(4, 4))["y"].dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    simple = nn.Linear(1, 1)
    autocast_forward(simple, CPU, "float16")
    assert pickle.loads(pickle.dumps(simple))(torch.ones(1, 1)).dtype == torch.float32  # noqa: S301


def test_a_forward_that_raises_leaves_nothing_open() -> None:
    model = nn.Linear(4, 4)
    autocast_forward(model, CPU, "bfloat16")
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 3))
    assert not torch.is_autocast_enabled("cpu")
    assert model(torch.ones(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_weights_are_those_of_autocast_in_one_process(kind: str) -> None:
    x = torch.linspace(-1, 1, 64).view(8, 8)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, own: bool) -> torch.Tensor:
        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", getattr(torch, kind), enabled=own):
                y = model(x * (step + 1))
            y.float().square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def body(session: Session) -> torch.Tensor:
        model = made(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        session.prepare(model, optimizer, [])
        return train(model, optimizer, False)

    alone = made(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
    expected = train(alone, torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9), True)
    # One worker: autocast's cache of weights belongs to the process, and workers are threads here.
    result: Any = run_job(body, replace(CONTEXT, autocast=kind)).results[0]  # type: ignore[arg-type]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- activation checkpointing


def test_which_blocks_repeat() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict(
        {
            "net": Net(),
            "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            "plain": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "one": nn.Sequential(Block(), nn.ReLU()),
        }
    )
    wanted = ["net.blocks.0", "net.blocks.1", "net.blocks.2", "encoder.layers.0", "encoder.layers.1"]
    assert list(repeated_blocks(model)) == wanted


def test_blocks_compute_again_and_nothing_else_changes() -> None:
    def backward(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model(x)["y"].square().mean().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return [*found, *(b.clone() for b in model.buffers())]

    def kept(model: nn.Module) -> int:
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        return count

    x = torch.linspace(-1, 1, 64).view(16, 4)
    plain, lighter = made(Net), made(Net)
    names = list(lighter.state_dict())
    Lighter(lighter, "off", True).apply([lighter], CPU)
    assert list(lighter.state_dict()) == names
    assert isinstance(lighter.blocks[0], Block)
    assert type(lighter.blocks[0]).__name__ == "Block"
    one, other = backward(plain), backward(lighter)
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert kept(lighter) < 0.6 * kept(plain)
    with torch.no_grad():
        assert torch.equal(lighter.eval()(x)["y"], plain.eval()(x)["y"])


def test_transformer_layers_compute_again_under_autocast() -> None:
    def grads(recomputes: bool) -> list[torch.Tensor]:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = made(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
        for block in repeated_blocks(model).values() if recomputes else ():
            recompute(block)
        autocast_forward(model, CPU, "bfloat16")
        torch.manual_seed(0)
        model(torch.linspace(0, 1, 48).view(2, 3, 8)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(grads(True), grads(False), strict=True))


def test_a_model_without_repeated_blocks_is_told() -> None:
    with pytest.warns(UserWarning, match="Linear has no nn.ModuleList"):
        Lighter(nn.Linear(1, 1), "off", True)


# ---------------------------------------------------------------- loss scaling

STEPS = 9
BAD = {(2, 0), (5, 0), (5, 1), (7, 1)}
"""(step, slot) whose gradients overflow"""


def line() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(0.2)
        model.bias.fill_(0.1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(step: int, slot: int) -> torch.Tensor:
    return torch.linspace(0.1 + slot, 1.0, 12).view(3, 4) * (1 + step / 5)


def scaled(unscales: bool) -> Callable[[Session], tuple[list[float], int, int]]:
    def body(session: Session) -> tuple[list[float], int, int]:
        model, optimizer = line()
        session.prepare(model, optimizer, [])
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(batch(step, session.slot)).square().mean()
            scaler.scale(loss * (float("inf") if (step, session.slot) in BAD else 1.0)).backward()
            session.batch_taken(0, 3, None)
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        session.pull()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
        return weights, session.clock, int(scaler.get_scale())

    return body


def expected(workers: int) -> list[float]:
    """In one process: in each step the mean of the gradients that are finite, and no step where there is none."""
    model, optimizer = line()
    for step in range(STEPS):
        optimizer.zero_grad()
        good = [slot for slot in range(workers) if (step, slot) not in BAD]
        for slot in good:
            (model(batch(step, slot)).square().mean() / len(good)).backward()
        if good:
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def non_finite(job: Job) -> list[Any]:
    return [shard.report["non_finite"] for shard in job.training.shards.values()]


@pytest.mark.parametrize("on_nan", ["fail", "skip"])
@pytest.mark.parametrize("unscales", [False, True])
def test_a_skipped_step_is_a_round_without_this_worker(unscales: bool, on_nan: str) -> None:
    job = run_job(scaled(unscales), replace(CONTEXT, workers=2, shards=2, on_nan=on_nan))
    wanted = expected(2)
    for slot, skipped in ((0, 2), (1, 2)):
        weights, clock, scale = job.results[slot]  # type: ignore[misc]
        assert weights == pytest.approx(wanted, abs=1e-6)
        assert clock == STEPS
        assert scale == 64 >> skipped
    assert not any(non_finite(job))


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "async"},
        {"mode": "ssp:1"},
        {"mode": "async", "shared_memory": False},
        {"mode": "async", "fetch_ahead": True},
    ],
)
def test_alone_a_skipped_step_changes_nothing(change: dict[str, Any]) -> None:
    weights, clock, _ = run_job(scaled(False), replace(CONTEXT, **change)).results[0]  # type: ignore[misc]
    assert clock == STEPS
    if not change.get("fetch_ahead"):
        assert weights == pytest.approx(expected(1), abs=1e-6)


@pytest.mark.parametrize("cadence", [(1, 3), (3, 3), (3, 1)])
def test_local_steps_are_skipped_too(cadence: tuple[int, int]) -> None:
    push, fetch = cadence
    context = replace(CONTEXT, mode="async", n_push=push, n_fetch=fetch)
    job = run_job(scaled(False), context)
    weights, clock, scale = job.results[0]  # type: ignore[misc]
    assert (clock, scale) == (STEPS, 16)
    assert all(abs(w) < 10 for w in weights)
    assert not any(non_finite(job))


def test_a_gradient_that_is_not_finite_without_a_scaler_is_still_refused() -> None:
    def body(session: Session) -> None:
        model, optimizer = line()
        session.prepare(model, optimizer, [])
        (model(batch(0, 0)).mean() * float("nan")).backward()
        optimizer.step()

    with pytest.raises(NonFiniteContribution):
        run_job(body)


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("shared", [True, False])
def test_accumulated_gradients_are_those_of_the_large_batch(overlap: str, shared: bool) -> None:
    parts, workers, steps = 3, 2, 5

    def body(session: Session) -> list[float]:
        model, optimizer = line()
        data = torch.utils.data.TensorDataset(torch.cat([batch(n, 0) for n in range(24)]))
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        [prepared] = session.prepare(model, optimizer, [loader])
        for number, (x,) in enumerate(prepared, 1):
            (model(x).square().mean() / parts).backward()
            if number % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
            if number == parts * steps:
                break
        assert session.clock == steps
        assert session._engine is not None
        assert session._engine.counters.samples == 2 * parts * steps
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    model, optimizer = line()
    rows = torch.cat([batch(n, 0) for n in range(24)])
    size = 2 * workers * parts
    for step in range(steps):
        optimizer.zero_grad()
        model(rows[step * size : (step + 1) * size]).square().mean().backward()
        optimizer.step()
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    context = replace(CONTEXT, workers=workers, shards=2, overlap=overlap, shared_memory=shared)
    job = run_job(body, context)  # type: ignore[arg-type]
    assert job.results[0] == pytest.approx(wanted, abs=1e-6)
