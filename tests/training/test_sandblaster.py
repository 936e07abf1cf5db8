"""Mode lbfgs in whole jobs: it reaches what torch's L-BFGS reaches, whoever is lost on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import downpour
from downpour.sandblaster import Data, Minimum, Objective, Wishes, minimize_alone
from downpour.session import Session
from downpour_common import messages as m
from downpour_common.errors import ConfigError, ModelError, NonFiniteContribution
from downpour_coordinator.effects import Send
from harness import CONTEXT, Job, make_job, repeat_at_once, run_job

LBFGS = replace(CONTEXT, mode="lbfgs", workers=2, shards=2)


def digits() -> TensorDataset:
    bunch = load_digits()
    return TensorDataset(torch.tensor(bunch.data[:500], dtype=torch.float32) / 16, torch.tensor(bunch.target[:500]))


def logistic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 10)


def wave() -> TensorDataset:
    x = torch.linspace(-3, 3, 96).unsqueeze(1)
    return TensorDataset(x, torch.sin(2 * x) + 0.3 * x)


def perceptron() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))


Criterion = Callable[[Any, Any], torch.Tensor]


def body_of(
    make: Callable[[], nn.Module], data: TensorDataset, criterion: Criterion, wishes: Wishes, batch: int = 64
) -> Callable[[Session], tuple[Minimum, list[torch.Tensor]]]:
    def body(session: Session) -> tuple[Minimum, list[torch.Tensor]]:
        model = make()
        (loader,) = session.prepare(model, None, [DataLoader(data, batch_size=batch, shuffle=True)])
        found = session.minimize(model, criterion, loader, wishes)
        return found, [p.detach().clone() for p in model.parameters()]

    return body


def alone(
    make: Callable[[], nn.Module], data: TensorDataset, criterion: Criterion, wishes: Wishes
) -> tuple[Minimum, list[torch.Tensor]]:
    model = make()
    found = minimize_alone(
        Objective(model, criterion, Data(DataLoader(data, batch_size=len(data)))), model, wishes, None
    )
    return found, [p.detach() for p in model.parameters()]


RIDGE = Wishes(max_iterations=200, weight_decay=1e-3, tolerance_change=1e-12)


def check_minimum(job: Job) -> Minimum:
    """All have the same, which is what its loss says."""
    (found, weights), *others = job.results.values()  # type: ignore[misc]
    for other, theirs in others:  # type: ignore[misc]
        assert other == found
        assert all(map(torch.equal, weights, theirs))
    assert isinstance(found, Minimum)
    return found


def test_logistic_regression_reaches_the_optimum_that_torch_reaches() -> None:
    data = digits()
    job = run_job(body_of(logistic, data, cross_entropy, RIDGE), LBFGS)
    found = check_minimum(job)
    theirs, weights = alone(logistic, data, cross_entropy, RIDGE)
    assert abs(found.loss - theirs.loss) <= 1e-6 * theirs.loss
    assert found.gradient <= 1e-4
    assert found.evaluations <= 1.5 * theirs.evaluations
    for mine, other in zip(job.results[0][1], weights, strict=True):  # type: ignore[index]
        assert torch.allclose(mine, other, atol=2e-2)
    steps = [row for row in job.rows if "step" in row and "bytes_per_shard" in row]
    assert len(steps) == found.iterations == job.training.clock()
    assert max(row["bytes_per_shard"] for row in steps[1:]) <= 1024
    losses = [row["loss"] for row in steps]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert job.training.latest["loss"] == found.loss


@pytest.mark.long
def test_a_small_net_reaches_a_loss_as_low_as_torch_s() -> None:
    wishes = Wishes(max_iterations=100, weight_decay=1e-3)
    found = check_minimum(run_job(body_of(perceptron, wave(), mse_loss, wishes, 16), LBFGS))
    theirs, _ = alone(perceptron, wave(), mse_loss, wishes)
    assert found.loss <= 1.01 * theirs.loss


# ---------------------------------------------------------------- whoever is lost


def small() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(240, 6, generator=generator)
    return TensorDataset(x, (x @ torch.randn(6, 3, generator=generator) + x[:, :3] ** 2).argmax(1))


def softmax() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


EASY = Wishes(max_iterations=100, weight_decay=1e-2, tolerance_grad=1e-4)
EASY_BODY = body_of(softmax, small(), cross_entropy, EASY, 16)


@pytest.fixture(scope="module")
def optimum() -> float:
    return alone(softmax, small(), cross_entropy, EASY)[0].loss


def near(found: Minimum, optimum: float) -> None:
    assert found.reason == "gradient"
    assert abs(found.loss - optimum) <= 1e-4 * optimum


@pytest.mark.parametrize("after", [7, 23])
def test_a_worker_that_is_killed_leaves_its_portion_to_others(after: int, optimum: float) -> None:
    job = make_job(EASY_BODY, LBFGS)
    job.kills = {1: [after]}
    with job.running():
        pass
    assert job.deaths == 1
    near(job.results[0][0], optimum)  # type: ignore[index]


def test_a_worker_that_is_asked_to_leave_does_so_within_a_portion(optimum: float) -> None:
    job = make_job(EASY_BODY, LBFGS)
    with job.running():
        job.wait_for(lambda: any("step" in row for row in job.rows), "iteration")
        job.sessions[1].drain.ask()
    near(job.results[0][0], optimum)  # type: ignore[index]
    assert job.training.workers[1].drained or 1 in job.results


def test_one_that_is_started_again_takes_part_in_the_run_or_has_its_result(optimum: float) -> None:
    job = make_job(EASY_BODY, LBFGS)
    job.kills = {1: [15]}
    with job.running():
        job.wait_for(lambda: job.deaths == 1, "death")
        job.start_worker(1, 1)
    near(check_minimum(job), optimum)


def test_a_coordinator_that_is_restarted_goes_on_from_the_point_reached(
    optimum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat_at_once(monkeypatch)
    job = make_job(EASY_BODY, LBFGS)
    job.loss = 0.05
    with job.running():
        job.wait_for(lambda: any("step" in row for row in job.rows), "iteration")
        job.restart_coordinator()
        seen = len(job.rows)
        job.wait_for(lambda: len(job.rows) > seen + 1, "iteration after it")
        job.restart_coordinator()
    assert job.lost
    near(check_minimum(job), optimum)


def test_a_shard_that_comes_back_without_its_vectors_has_them_begin_anew(
    optimum: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    repeat_at_once(monkeypatch)
    job = make_job(EASY_BODY, LBFGS)
    job.folder, job.keeps = str(tmp_path), True
    with job.running():
        job.wait_for(lambda: any("step" in row for row in job.rows), "iteration")
        job.snapshot(1)
        job.kill_shard(0, 3, 1)
    assert job.deaths == 1
    near(check_minimum(job), optimum)
    assert job.training._minimiser._attempt > 1
    assert not job.training.lost()


def test_a_slow_worker_s_portion_is_computed_by_another(optimum: float) -> None:
    """Worker 1 stands still in its third portion until all is over."""
    over = threading.Event()

    class Slow(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                over.wait(30)
            return super().forward(x)

    def slow() -> nn.Module:
        torch.manual_seed(0)
        return Slow(6, 3)

    def body(session: Session) -> Any:
        if session.slot:
            return body_of(slow, small(), cross_entropy, EASY, 16)(session)
        found = EASY_BODY(session)
        over.set()
        return found

    job = run_job(body, LBFGS)
    near(check_minimum(job), optimum)
    assert job.rows[-1]["backups"] >= 1
    assert over.is_set()


def test_a_snapshot_holds_the_point_reached_and_not_what_is_tried(optimum: float) -> None:
    """And the commands of a run are repeatable: each comes twice here."""
    job = make_job(EASY_BODY, LBFGS)
    usual = job._carry_out

    def twice(effects: list[Any]) -> None:
        usual(effects + [e for e in effects if isinstance(e, Send) and isinstance(e.message, m.VectorOps)])

    job._carry_out = twice  # type: ignore[method-assign]
    with job.running():
        pass
    found = check_minimum(job)
    near(found, optimum)
    for service in job.services.values():
        assert service._shard is not None
        for stored in service._shard._trainable:
            assert stored.reached is not None
            assert torch.equal(stored.reached, stored.weights)


# ---------------------------------------------------------------- what a script may do wrong, or otherwise


def test_several_calls_and_the_options_of_a_prepared_lbfgs() -> None:
    def body(session: Session) -> list[Minimum]:
        model = softmax()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, max_eval=20, tolerance_grad=1e-3, history_size=3)
        (loader,) = session.prepare(model, optimizer, [DataLoader(small(), batch_size=50)])
        first = session.minimize(model, cross_entropy, loader, Wishes())
        second = session.minimize(model, cross_entropy, loader, Wishes(max_iterations=60))
        with pytest.raises(ConfigError, match=r"call downpour\.minimize"):
            optimizer.step()
        with pytest.raises(ConfigError, match=r"call downpour\.minimize"):
            session.push(1)
        return [first, second]

    job = run_job(body, replace(LBFGS, workers=3))
    first, second = job.results[0]  # type: ignore[misc]
    assert job.results[1] == job.results[2] == [first, second]
    assert (first.iterations, first.reason) == (4, "iterations")
    assert second.loss < first.loss
    assert second.reason == "gradient"


def test_workers_must_want_the_same() -> None:
    def body(session: Session) -> None:
        model = softmax()
        (loader,) = session.prepare(model, None, [DataLoader(small(), batch_size=50)])
        wishes = Wishes(max_iterations=3 + session.slot)
        session.minimize(model, cross_entropy, loader, wishes)

    with pytest.raises(ConfigError, match=r"in the same way, but here with max_iterations=\d, elsewhere with"):
        run_job(body, LBFGS)


def test_a_loss_that_cannot_be_computed_makes_smaller_steps_and_fails_nobody() -> None:
    """log(1 - w) beyond w = 1: the first step of this length leads there."""
    data = TensorDataset(torch.ones(40, 1), torch.zeros(40, 1))

    def make() -> nn.Module:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, -3.0)
        return layer

    def criterion(outputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (-torch.log(1 - outputs) - 3 * outputs).mean()

    job = run_job(body_of(make, data, criterion, Wishes(lr=40.0, tolerance_grad=1e-4), 4), LBFGS)
    found, (weight,) = job.results[0]  # type: ignore[misc]
    assert found.reason == "gradient"
    assert weight.item() == pytest.approx(2 / 3, abs=1e-3)


def test_a_portion_with_nan_is_refused_by_the_shard_itself() -> None:
    def body(session: Session) -> None:
        model = softmax()
        session.prepare(model, None, [])
        session._engine._space.gradients[0].fill_(float("nan"))  # type: ignore[union-attr]
        assert session._client is not None
        session._client.push_portion(session._client._layout.by_kind["trainable"], 1, 1, 1)

    with pytest.raises(NonFiniteContribution):
        run_job(body, replace(LBFGS, workers=1))


@pytest.mark.parametrize(
    ("mode", "optimizer", "error", "words"),
    [
        ("lbfgs", torch.optim.Adam, ModelError, "Adam takes no part"),
        ("async", torch.optim.LBFGS, ModelError, "add --mode lbfgs"),
        ("async", torch.optim.SGD, ConfigError, "belongs to --mode lbfgs"),
    ],
)
def test_other_optimizers_and_modes_are_refused_in_words(
    mode: str, optimizer: type[torch.optim.Optimizer], error: type[Exception], words: str
) -> None:
    def body(session: Session) -> None:
        model = softmax()
        (loader,) = session.prepare(model, optimizer(model.parameters()), [DataLoader(small())])  # type: ignore[call-arg]
        session.minimize(model, cross_entropy, loader, Wishes())

    with pytest.raises(error, match=words):
        run_job(body, replace(LBFGS, mode=mode, workers=1))


def test_data_that_cannot_be_cut_is_refused() -> None:
    data = small()
    for loader in (
        DataLoader(data, batch_size=None),
        DataLoader(data, sampler=torch.utils.data.SubsetRandomSampler([1, 2])),
        DataLoader(torch.utils.data.Subset(data, [])),
    ):
        with pytest.raises(ConfigError):
            Data(loader)


def test_without_a_launcher_it_is_torch_s_own() -> None:
    model = softmax()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, max_eval=30)
    model, optimizer, loader = downpour.prepare(model, optimizer, DataLoader(small(), batch_size=16, shuffle=True))
    first = downpour.minimize(model, cross_entropy, loader, weight_decay=1e-2)
    found = downpour.minimize(model, cross_entropy, loader, weight_decay=1e-2, max_iterations=50, tolerance_grad=1e-4)
    assert isinstance(found, downpour.Minimum)
    assert (first.iterations, first.reason, found.reason) == (3, "iterations", "gradient")
    outputs = model(small().tensors[0])
    decay = sum(float(p.detach().square().sum()) for p in model.parameters()) * 5e-3
    assert found.loss == pytest.approx(cross_entropy(outputs, small().tensors[1]).item() + decay, rel=1e-5)


def test_a_batch_is_what_the_loader_would_make_of_it() -> None:
    data = small()
    for dataset in (data, torch.utils.data.Subset(data, range(len(data)))):
        found = Data(DataLoader(dataset, batch_size=50))
        for at, expected in enumerate(DataLoader(data, batch_size=50)):
            batch = found.batch(50 * at, min(50 * at + 50, 240))
            assert all(map(torch.equal, batch, expected))


def test_dropout_is_warned_of() -> None:
    data = Data(DataLoader(small(), batch_size=8))
    with pytest.warns(UserWarning, match="dropout"):
        Objective(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), cross_entropy, data)
