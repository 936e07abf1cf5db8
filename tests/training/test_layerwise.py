"""``fetch=layers``: the same weights as when all are here all the time, in a part of the memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from downpour.context import WorkerContext
from downpour.layerwise.engine import LayerwiseEngine
from downpour.session import Session
from downpour_common.errors import ConfigError, ModelError, NonFiniteContribution
from harness import CONTEXT, make_job, repeat_at_once, run_job

LAYERS = replace(CONTEXT, fetch="layers", shards=2, memory=40_000)
STEPS = 5
Optimize = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def mlp() -> nn.Module:
    """About 100 kB, in layers of 9 kB."""
    layers = [layer for _ in range(11) for layer in (nn.Linear(48, 48), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(48, 1))


class Various(nn.Module):
    """No plain chain: tied and frozen weights, buffers, attention, parameters of the model's own, some unused."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.embed = nn.Embedding(40, 16)
        self.attend = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.fixed = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.list = nn.ParameterList([nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))])
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(16, 40)
        self.head.weight = self.embed.weight
        self.fixed.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.ones_(self.list[0])
        nn.init.zeros_(self.list[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x[:, :6].abs().mul(100).long() % 40
        seen = self.attend(self.embed(tokens)) * self.scale
        mixed = checkpoint(lambda h: functional.relu_(self.fixed(h)), seen, use_reentrant=False)
        normed = self.norm(mixed.mean(1)) * self.list[0] + self.list[1]
        out: torch.Tensor = self.head(normed)
        return out


ONE_AT_A_TIME = threading.Lock()


def alike(make: Callable[[], nn.Module]) -> nn.Module:
    """The same model in all workers, which are threads of one process here."""
    with ONE_AT_A_TIME:
        torch.manual_seed(0)
        return make()


def batch(slot: int, step: int) -> torch.Tensor:
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(100 * step + slot))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
    assert isinstance(loss, torch.Tensor)
    return loss


def weights(model: nn.Module, session: Session) -> dict[str, torch.Tensor]:
    """All that the servers hold, brought here."""
    assert session._client is not None
    if isinstance(session._engine, LayerwiseEngine):
        session.pull()
        return state_of(session._engine, model)
    session.pull()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def state_of(engine: LayerwiseEngine, model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights and buffers."""
    return {name: engine.weights_of(t).clone() for name, t in model.state_dict(keep_vars=True).items()}


def body(make: Callable[[], nn.Module], optimize: Optimize, steps: int = STEPS) -> Callable[[Session], Any]:
    def train(session: Session) -> Any:
        model = alike(make)
        optimizer = optimize(model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        session.prepare(model, optimizer, [])
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, batch(session.slot, step)).backward()
            optimizer.step()
            schedule.step()
            if step == 1:
                with torch.no_grad():
                    model.eval()(batch(session.slot, step))
                    model.train()
        session.barrier()
        return weights(model, session), session._engine

    return train


def both(make: Callable[[], nn.Module], optimize: Optimize, context: WorkerContext) -> tuple[Any, Any, LayerwiseEngine]:
    """The weights of each worker, trained with all weights here and layer by layer, and the latter's engine."""
    whole = run_job(body(make, optimize), replace(context, fetch="whole", memory=0)).results
    layers = run_job(body(make, optimize), context).results
    engine = layers[0][1]
    assert isinstance(engine, LayerwiseEngine)
    return {s: r[0] for s, r in whole.items()}, {s: r[0] for s, r in layers.items()}, engine


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("optimize", [sgd, adam])
@pytest.mark.parametrize("workers", [1, 2])
def test_sync_gives_the_weights_of_the_plain_run_in_a_third_of_the_memory(optimize: Optimize, workers: int) -> None:
    whole, layers, engine = both(mlp, optimize, replace(LAYERS, workers=workers))
    for slot in range(workers):
        torch.testing.assert_close(layers[slot], whole[slot], rtol=1e-6, atol=1e-7)
    assert nbytes(whole[0]) > 2.5 * LAYERS.memory, "weights alone; with gradients twice that"
    assert engine.ledger.peak <= LAYERS.memory
    assert engine.ledger.held == 0


def test_tied_frozen_unused_and_recomputed_parameters_and_buffers_are_as_in_the_plain_run() -> None:
    whole, layers, engine = both(Various, sgd, replace(LAYERS, memory=30_000))
    torch.testing.assert_close(layers, whole, rtol=1e-6, atol=1e-7)
    assert engine.ledger.peak <= 30_000


class Independent(nn.Module):
    """Whatever the weights, each one's gradient is −1."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Linear(900, 1, bias=False) for _ in range(6)])
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-row(x) for row in self.rows]).sum()


@pytest.mark.parametrize("mode", ["async", "ssp:0", "ssp:2"])
def test_in_every_mode_each_step_of_each_worker_counts_once(mode: str) -> None:
    def count(session: Session) -> Any:
        model = Independent()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.prepare(model, optimizer, [])
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.ones(1, 900)).backward()
            optimizer.step()
        session.barrier()
        return weights(model, session)

    job = run_job(count, replace(LAYERS, mode=mode, workers=2, memory=12_000))
    for found in job.results.values():
        assert isinstance(found, dict)
        for weight in found.values():
            assert torch.equal(weight, torch.full((1, 900), 2.0 * STEPS))
    if mode.startswith("ssp"):
        assert all(shard.report["clock_gap_max"] <= int(mode[-1]) for shard in job.training.shards.values())


def test_a_model_on_the_meta_device_is_made_layer_by_layer_as_the_script_would() -> None:
    def train(session: Session) -> Any:
        with torch.device("meta"):
            model = Various()
        optimizer = sgd(model.parameters())
        torch.manual_seed(0)
        session.prepare(model, optimizer, [])
        assert isinstance(session._engine, LayerwiseEngine)
        assert session._layerwise is not None
        assert session._layerwise.ledger.peak < 30_000
        made = state_of(session._engine, model)
        loss_of(model, batch(0, 0)).backward()
        optimizer.step()
        return made, state_of(session._engine, model)

    made, trained = run_job(train, replace(LAYERS, memory=0)).results[0]
    assert made["norm.running_var"].equal(torch.ones(16))
    assert made["scale"].equal(torch.ones(16))
    assert made["embed.weight"].equal(made["head.weight"])
    assert made["embed.weight"].std() > 0.5
    assert all(t.isfinite().all() for t in trained.values())
    assert not trained["embed.weight"].equal(made["embed.weight"])
    assert trained["fixed.weight"].equal(made["fixed.weight"])
    assert trained["unused.weight"].equal(made["unused.weight"])


def test_a_chain_on_the_meta_device_begins_with_the_very_weights_of_the_plain_one() -> None:
    def train(session: Session) -> Any:
        with torch.device("meta"):
            model = mlp()
        torch.manual_seed(0)
        session.prepare(model, sgd(model.parameters()), [])
        assert isinstance(session._engine, LayerwiseEngine)
        return state_of(session._engine, model)

    found = run_job(train, LAYERS).results[0]
    torch.testing.assert_close(found, dict(alike(mlp).state_dict()), rtol=0, atol=0)


def attempt(use: Callable[[nn.Module, torch.optim.Optimizer], object]) -> Callable[[Session], None]:
    def train(session: Session) -> None:
        model = mlp()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer, [])
        loss_of(model, batch(0, 0)).backward()
        use(model, optimizer)

    return train


def again(model: nn.Module, _optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, batch(0, 0)).backward()


def without_zeroing(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    loss_of(model, batch(0, 0)).backward()


def another_rate(_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()


REFUSED: dict[str, Callable[[nn.Module, Any], object]] = {
    "parameter.register_hook": lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "one backward": again,
    "after optimizer.zero_grad": without_zeroing,
    "cannot be taken back": lambda _, optimizer: optimizer.zero_grad(),
    "options .* have changed": another_rate,
    "Call that module": lambda model, _: model[0].weight.sum(),  # type: ignore[index]
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_what_needs_all_gradients_or_weights_at_once_is_refused_with_the_way_out(reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        run_job(attempt(REFUSED[reason]), replace(LAYERS, memory=0))


def test_a_layer_that_exceeds_the_budget_alone_is_an_error_before_training() -> None:
    with pytest.raises(ModelError, match=r"layer 0 alone needs .*--set memory="):
        run_job(body(mlp, sgd), replace(LAYERS, memory=20_000))


def test_settings_that_hold_all_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_push"):
        run_job(body(mlp, sgd), replace(LAYERS, mode="async", n_push=2))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    def train(session: Session) -> None:
        model = mlp()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer, [])
        (loss_of(model, batch(0, 0)) * float("nan")).backward()
        optimizer.step()

    with pytest.raises(NonFiniteContribution, match=r"step 0: the gradient of \d+\.\w+ holds NaN"):
        run_job(train, LAYERS)


def by_batches(session: Session) -> Any:
    """Steps of uneven batches from a loader, and what the weights are then."""
    model = alike(mlp)
    optimizer = adam(model.parameters())
    data = torch.randn(27, 48, generator=torch.Generator().manual_seed(5))
    (loader,) = session.prepare(model, optimizer, [DataLoader(TensorDataset(data), batch_size=4, shuffle=True)])
    while loader.epoch < 2:
        for (x,) in loader:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        with torch.no_grad():
            loss_of(model, data)
    session.pull()
    return weights(model, session), session.clock


def test_batches_weigh_and_passes_end_as_in_the_plain_run() -> None:
    context = replace(LAYERS, workers=3)
    whole = run_job(by_batches, replace(context, fetch="whole", memory=0))
    layers = run_job(by_batches, context)
    for slot, (expected, clock) in whole.results.items():
        found, own_clock = layers.results[slot]
        assert own_clock == clock
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def goes_on(session: Session) -> Any:
    """Goes on at the step of the worker whose place it takes."""
    model = alike(mlp)
    optimizer = sgd(model.parameters())
    session.prepare(model, optimizer, [])
    for step in range(session.clock, STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(session.slot, step)).backward()
        optimizer.step()
    return weights(model, session)


@pytest.mark.parametrize("part", [pytest.param(n, marks=() if n % 3 == 1 else pytest.mark.long) for n in range(6)])
def test_a_worker_that_dies_between_layers_is_taken_over(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    repeat_at_once(monkeypatch)
    context = replace(LAYERS, workers=2, memory=30_000)
    calm = make_job(goes_on, context)
    with calm.running():
        pass
    killed = make_job(goes_on, context)
    killed.takes_over, killed.kills = True, {part % 2: [calm.clients[0].sent * (part + 1) // 7]}
    with killed.running():
        pass
    assert killed.deaths == 1
    for slot in range(2):
        torch.testing.assert_close(killed.results[slot], calm.results[slot], rtol=1e-6, atol=1e-7)


def test_rounded_gradients_are_those_of_the_plain_run() -> None:
    whole, layers, _ = both(mlp, sgd, replace(LAYERS, push_dtype="bfloat16"))
    torch.testing.assert_close(layers, whole, rtol=1e-6, atol=1e-7)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 24, num_layers=2, batch_first=True)
        self.out = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.lstm(x.view(len(x), 4, 12))[0][:, -1])
        return out


def test_a_recurrent_model_made_on_the_meta_device_is_written_as_the_plain_one_is(tmp_path: Path) -> None:
    def train(session: Session) -> None:
        whole = session.context.fetch == "whole"
        with torch.device("cpu" if whole else "meta"):
            model = alike(Recurrent)
        optimizer = sgd(model.parameters())
        torch.manual_seed(0)
        session.prepare(model, optimizer, [])
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(0, step)).backward()
            optimizer.step()
        session.save(str(tmp_path / session.context.fetch))

    run_job(train, replace(LAYERS, fetch="whole", memory=0))
    run_job(train, replace(LAYERS, memory=90_000))
    written = load_file(tmp_path / "layers")
    torch.testing.assert_close(written, load_file(tmp_path / "whole"), rtol=1e-6, atol=1e-7)
    Recurrent().load_state_dict(written)
