"""``average``, ``easgd`` and ``diloco`` against loops written by hand in plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from downpour.session import Session
from downpour_common.errors import ConfigError, ModelError, NonFiniteContribution
from harness import CONTEXT, Killed, make_job, run_job

STEPS = 24
MakeOptimizer = Callable[[nn.Module], Optimizer]


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4, generator=generator)
    return model


def backward(model: nn.Module, step: int, slot: int) -> None:
    generator = torch.Generator().manual_seed(1000 * slot + step)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    nn.functional.mse_loss(model(x), torch.sin(2 * x[:, :2])).backward()


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def fill(model: nn.Module, values: torch.Tensor) -> None:
    torch.nn.utils.vector_to_parameters(values.clone(), model.parameters())


class Local:
    """A worker of the loop written by hand."""

    def __init__(self, slot: int, make: MakeOptimizer) -> None:
        self.slot, self.model = slot, make_model()
        self.optimizer = make(self.model)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 10, 0.5)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        backward(self.model, step, self.slot)
        self.optimizer.step()
        self.schedule.step()


def body(make: MakeOptimizer, steps: int = STEPS) -> Callable[[Session], torch.Tensor]:
    def run(session: Session) -> torch.Tensor:
        local = Local(session.slot, make)
        session.prepare(local.model, local.optimizer, [])
        for step in range(steps):
            local.step(step)
        return flat(local.model)

    return run


def context(mode: str, **fields: Any) -> Any:
    return replace(CONTEXT, **{"mode": mode, "workers": 2, "shards": 2, "chunk_bytes": 1024, **fields})


def test_average_of_every_step_is_sync_with_sgd() -> None:
    sync: Any = run_job(body(sgd), context("sync")).results
    average: Any = run_job(body(sgd), context("average:1")).results
    assert (sync[0] - average[0]).abs().max() <= 1e-12
    assert torch.equal(average[0], average[1])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "sent"])
def test_average_is_local_sgd(shared: bool) -> None:
    """Any optimizer, with a schedule: its state stays with the worker."""
    workers = [Local(slot, adamw) for slot in range(2)]
    for step in range(STEPS):
        for worker in workers:
            worker.step(step)
        if (step + 1) % 8 == 0:
            mean = (flat(workers[0].model) + flat(workers[1].model)) / 2
            for worker in workers:
                fill(worker.model, mean)
    results: Any = run_job(body(adamw), context("average:8", shared_memory=shared)).results
    assert (results[0] - flat(workers[0].model)).abs().max() <= 1e-12
    assert torch.equal(results[0], results[1])


def outer_steps(workers: list[Local], centre: nn.Module, every: int, parts: list[torch.Tensor]) -> None:
    """DiLoCo with one outer optimizer per part of the flat vector."""
    state = flat(centre)
    outers = []
    for part in parts:
        weights = nn.Parameter(state[part].clone())
        outers.append((weights, SGD([weights], lr=0.7, momentum=0.9, nesterov=True)))
    for step in range(STEPS):
        for worker in workers:
            worker.step(step)
        for j, (part, (weights, outer)) in enumerate(zip(parts, outers, strict=True)):
            if (step + 1) % every == (j + 1) * every // len(parts) % every:
                locals_ = [flat(worker.model) for worker in workers]
                weights.grad = torch.stack([weights.detach() - w[part] for w in locals_]).mean(0)
                outer.step()
                for worker, own in zip(workers, locals_, strict=True):
                    own[part] = weights.detach()
                    fill(worker.model, own)


def places(session: Session) -> list[torch.Tensor]:
    """By fragment, where its elements are in :func:`flat`."""
    engine, space = session._engine, session._engine._space  # type: ignore[union-attr]
    spec, at, starts = space.layout.model, 0, {}
    for tensor in spec.tensors:
        starts[tensor.name] = at
        at += tensor.numel
    found = []
    for fragment in engine._fragments:  # type: ignore[union-attr]
        ranges = [
            torch.arange(starts[t.name] + first, starts[t.name] + first + count)
            for chunk in fragment.chunks
            for t, first, _, count in space.layout.pieces_of(chunk)
        ]
        found.append(torch.cat(ranges))
    return found


@pytest.mark.parametrize("fragments", [1, 3])
def test_diloco_is_an_outer_nesterov_step(fragments: int) -> None:
    parts: list[torch.Tensor] = []
    moved: list[int] = []

    def run(session: Session) -> torch.Tensor:
        local = Local(session.slot, adamw)
        session.prepare(local.model, local.optimizer, [])
        if session.slot == 0:
            parts.extend(places(session))
        for step in range(STEPS):
            before = session._client.traffic.bytes_sent  # type: ignore[union-attr]
            local.step(step)
            if session.slot == 0:
                moved.append(session._client.traffic.bytes_sent - before)  # type: ignore[union-attr]
        return flat(local.model)

    job = run_job(run, context(f"diloco:6,fragments={fragments}", chunk_bytes=256))
    workers = [Local(slot, adamw) for slot in range(2)]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(flat(workers[0].model))))
    outer_steps(workers, make_model(), 6, parts)
    results: Any = job.results
    for slot in range(2):
        assert (results[slot] - flat(workers[slot].model)).abs().max() <= 1e-12
    whole = len(flat(workers[0].model)) * 8
    assert sum(moved) == whole * STEPS // 6
    assert max(moved) <= whole / fragments * 1.25


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_easgd_with_one_worker(momentum: float) -> None:
    """Algorithms 1 and 2 of the paper, with plain SGD, in the order: h steps, then the spring."""
    every, alpha, lr = 4, 0.3, 0.05
    model = make_model()
    x, v = flat(model), torch.zeros_like(flat(model))
    centre = x.clone()
    for step in range(STEPS):
        fill(model, x + momentum * v)
        model.zero_grad()
        backward(model, step, 0)
        v = momentum * v - lr * torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        x = x + v
        if (step + 1) % every == 0:
            d = alpha * (x - centre)
            x, centre = x - d, centre + d

    def run(session: Session) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = make_model()
        optimizer = sgd(own)
        session.prepare(own, optimizer, [])
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(own, step, 0)
            optimizer.step()
            session.pull()  # which shows the centre, and changes nothing
            shown = flat(own)
        optimizer.zero_grad()
        return shown, flat(own), flat(session.unsplit(own))

    result: Any = run_job(run, context(f"easgd:{every},alpha={alpha},momentum={momentum}", workers=1)).results[0]
    shown, own, saved = result
    assert (shown - centre).abs().max() <= 1e-12
    assert torch.equal(shown, saved)
    assert (own - (x + momentum * v)).abs().max() <= 1e-12


def test_easgd_with_two_workers_in_turn() -> None:
    every, alpha = 3, 0.45
    workers = [Local(slot, adamw) for slot in range(2)]
    centre = flat(workers[0].model)
    for step in range(STEPS):
        for worker in workers:
            worker.step(step)
            if (step + 1) % every == 0:
                x = flat(worker.model)
                d = alpha * (x - centre)
                fill(worker.model, x - d)
                centre = centre + d
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def run(session: Session) -> torch.Tensor:
        local = Local(session.slot, adamw)
        session.prepare(local.model, local.optimizer, [])
        for step in range(STEPS):
            assert turns[session.slot].acquire(timeout=20)
            local.step(step)
            turns[1 - session.slot].release()
        session.barrier()
        own = flat(local.model)
        session.pull()
        assert (flat(local.model) - centre).abs().max() <= 1e-12
        return own

    results: Any = run_job(run, context(f"easgd:{every}")).results
    for slot in range(2):
        assert (results[slot] - flat(workers[slot].model)).abs().max() <= 1e-12


@pytest.mark.parametrize("mode", ["average:7", "diloco:7,momentum=0,lr=1,fragments=3"])
def test_nothing_is_lost_at_a_barrier_or_at_the_end(mode: str) -> None:
    """The ledger: each worker adds one to its own half at every step, and a mean takes a part of it."""

    def run(session: Session) -> list[float]:
        model = nn.ParameterDict({"ledger": nn.Parameter(torch.zeros(300))})
        optimizer = SGD(model.parameters(), lr=1.0, maximize=True)
        session.prepare(model, optimizer, [])
        mine = slice(session.slot * 150, session.slot * 150 + 150)
        seen = []
        for steps in (session.slot * 9 + 10, 3):
            for _ in range(steps):
                optimizer.zero_grad()
                grad = model["ledger"].grad
                assert grad is not None
                grad[mine] = 1.0
                optimizer.step()
            session.pull()  # in the middle of a period: what has not been exchanged stays
            seen.append(float(model["ledger"].detach()[mine].sum()))
            session.barrier()
            values = model["ledger"].detach()
            seen.append(float(values.sum()))
        return seen

    results: Any = run_job(run, context(mode, chunk_bytes=64)).results
    assert results[0][1] == results[1][1]
    assert results[0][3] == results[1][3]
    assert results[0][3] > results[0][1] > 150 * (10 + 19) / 2 - 1


@pytest.mark.parametrize("mode", ["average:4", "diloco:4", "diloco:4,fragments=2", "easgd:4,alpha=0.4"])
def test_uneven_workers_never_hang(mode: str) -> None:
    """One ends early, one comes late, one is lost and comes again; barriers wait for whoever is there."""
    third_may_come = threading.Event()

    def run(session: Session) -> int:
        local = Local(session.slot, adamw)
        session.prepare(local.model, local.optimizer, [])
        steps = {0: 41, 1: 7, 2: 18}[session.slot]
        for step in range(steps):
            local.step(step)
            if session.slot == 0 and step == 11:
                third_may_come.set()
        return session.clock

    job = make_job(run, context(mode))
    with job.running():
        assert third_may_come.wait(20)
        job.start_worker(2)
    assert job.results[0] == 41
    assert {0, 1, 2} <= job.results.keys()


def test_one_that_is_lost_is_not_waited_for() -> None:
    replaced = threading.Event()

    def run(session: Session) -> None:
        local = Local(session.slot, adamw)
        session.prepare(local.model, local.optimizer, [])
        if session.context.worker_epoch:
            replaced.set()
        for step in range(20):
            if session.slot == 0 and step == 15:  # of three exchanges the other had a part in one
                assert replaced.wait(20), "it must be there before all have ended"
            local.step(step)
            if session.slot == 1 and step == 5 and not session.context.worker_epoch:
                raise Killed

    job = make_job(run, context("average:4"))
    with job.running():
        job.wait_for(lambda: job.training.workers[1].gone, "death")  # else it is the next one that is taken for lost
        job.start_worker(1, epoch=1)
    assert job.results.keys() == {0, 1}


@pytest.mark.parametrize("mode", ["average:50", "easgd:50", "diloco:50"])
def test_bytes_are_those_of_one_exchange(mode: str) -> None:
    def run(session: Session) -> int:
        body(sgd, 100)(session)
        assert session._client is not None
        return session._client.traffic.bytes_sent + session._client.traffic.bytes_received

    ours: Any = run_job(run, context(mode)).results
    sync: Any = run_job(run, context("sync")).results
    first = len(flat(make_model())) * 8  # of the start, for one that is not the chief
    for slot in range(2):
        assert ours[slot] - slot * first <= (sync[slot] - slot * first) / 45


def test_gradients_with_nan() -> None:
    def run(session: Session) -> torch.Tensor:
        local = Local(session.slot, adamw)
        session.prepare(local.model, local.optimizer, [])
        for step in range(8):
            local.optimizer.zero_grad()
            backward(local.model, step, session.slot)
            if session.slot == session.context.workers - 1 and step == 2:
                next(local.model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
            local.optimizer.step()
        return flat(local.model)

    with pytest.warns(UserWarning, match="leaves such steps out"):
        results: Any = run_job(run, context("average:4", on_nan="skip")).results
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1])
    with pytest.raises(NonFiniteContribution, match=r"what has become of \d\.(weight|bias)"):
        run_job(run, context("average:4", workers=1))


def test_a_gradient_scaler_skips_local_steps() -> None:
    def run(session: Session) -> tuple[torch.Tensor, int, float]:
        model = make_model().float()
        optimizer = sgd(model)
        session.prepare(model, optimizer, [])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30)
        for step in range(8):
            optimizer.zero_grad()
            x = torch.full((2, 6), float(step + session.slot))
            scaler.scale(100 * model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return flat(model), session.clock, scaler.get_scale()

    results: Any = run_job(run, context("average:4")).results
    weights, clock, scale = results[0]
    assert torch.isfinite(weights).all()
    assert torch.equal(weights, results[1][0])
    assert clock == 8
    assert scale < 2.0**127


def test_what_makes_no_sense_is_said() -> None:
    def push(session: Session) -> None:
        model = make_model()
        session.prepare(model, sgd(model), [])
        session.push(1)

    with pytest.raises(ConfigError, match="in mode average:4 workers exchange weights"):
        run_job(push, context("average:4", workers=1))

    def sparse(session: Session) -> None:
        model = make_model()
        session.prepare(model, torch.optim.SparseAdam(model.parameters()), [])

    with pytest.raises(ModelError, match="wants sparse gradients"):
        run_job(sparse, context("average:4", workers=1))
