"""What scripts without a loader need, and reinforcement learning: samples, versions, an end that all agree on."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import downpour
from downpour.session import Session
from downpour_common.errors import ConfigError
from harness import CONTEXT, run_job

EXAMPLES = Path(__file__).parents[2] / "examples"


def prepared(session: Session) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.01)
    session.prepare(model, optimizer, [])
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_steps_without_a_loader_count_the_samples_that_they_are_said_to_have(mode: str) -> None:
    def body(session: Session) -> None:
        model, optimizer = prepared(session)
        for _ in range(4):
            session.add_samples(5)
            session.add_samples(2)
            step(model, optimizer)
        step(model, optimizer)
        session.push(3)

    job = run_job(body, replace(CONTEXT, mode=mode))
    progress = job.training.workers[0].progress
    assert progress is not None
    assert (progress.samples, progress.clock) == (31, 6)


def test_the_version_tells_how_many_updates_the_weights_have_had() -> None:
    def body(session: Session) -> list[int]:
        model, optimizer = prepared(session)
        seen = [session.version]
        session.barrier()
        for _ in range(3):
            step(model, optimizer)
            seen.append(session.version)
        session.barrier()
        seen.append(session.version)
        session.pull()
        seen.append(session.version)
        return seen

    assert run_job(body, replace(CONTEXT, chunk_bytes=16)).results == {0: [0, 1, 2, 3, 3, 3]}
    together = run_job(body, replace(CONTEXT, mode="async", workers=2, shards=2)).results
    for seen in together.values():
        assert isinstance(seen, list)
        assert seen[-1] == 6, "all updates of both"
        lags = [now - 1 - before for before, now in pairwise(seen[:4])]
        assert all(lag >= 0 for lag in lags)
    assert run_job(body, replace(CONTEXT, mode="sync", workers=2)).results[1] == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("mode", ["async", "ssp:1", "sync"])
def test_one_worker_ends_the_training_of_all(mode: str) -> None:
    def body(session: Session) -> bool:
        model, optimizer = prepared(session)
        for number in count():
            step(model, optimizer)
            if session.slot == 1 and number == 9:
                session.stop("enough")
            if session.should_stop():
                break
        return session.drain.job_ends

    job = run_job(body, replace(CONTEXT, mode=mode, workers=3))
    assert job.results == {0: False, 1: False, 2: False}, "nothing interrupts the job: SIGTERM asks to leave as before"
    assert [row for row in job.rows if "ends" in row] == [{"ends": "enough", "worker": 1, "clock": 10}]
    assert all(worker.finished for worker in job.training.workers.values())


def test_a_notice_that_is_lost_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downpour.session.PROGRESS_S", 0.0)

    def body(session: Session) -> None:
        model, optimizer = prepared(session)
        if session.slot == 0:
            session.stop("")
        while not session.should_stop():
            step(model, optimizer)
            session._stop.clear() if session.clock < 20 else None

    assert run_job(body, replace(CONTEXT, mode="async", workers=2)).training.done_because == "done"


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downpour.api._stopped", False)
    downpour.add_samples(3)
    assert (downpour.version(), downpour.should_stop()) == (0, False)
    downpour.stop("done")
    assert downpour.should_stop()
    with pytest.raises(ConfigError, match="not a number of samples"):
        downpour.add_samples(0)


# ---------------------------------------------------------------- the examples


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium", reason="of the examples extra")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("downpour.api._stopped", False)


@pytest.mark.usefixtures("examples")
def test_vtrace_is_what_the_paper_says() -> None:
    """Against equation 1 as it stands there: for each s, a sum over t of products of c."""
    from cartpole_env import Trajectory
    from cartpole_impala import vtrace

    steps, gamma, lam, (most_rho, most_c) = 7, 0.9, 0.8, (1.2, 0.7)
    draw = torch.Generator().manual_seed(5)
    acted, now, rewards, values = (torch.randn(n, 1, generator=draw, dtype=torch.float64) for n in (7, 7, 7, 8))
    nothing = torch.zeros(steps, 1, dtype=torch.bool)
    fell, late = nothing.clone(), nothing.clone()
    fell[2], late[4] = True, True
    ends, cuts = fell, fell | late
    actions = torch.zeros(steps, 1, dtype=torch.int64)
    played = Trajectory(torch.zeros(8, 1, 4), actions, acted, rewards, ends, cuts, ~nothing, 0)
    targets, advantages = vtrace(played, now, values, gamma, lam, (most_rho, most_c))

    ratio = [float((now[t] - acted[t]).exp()) for t in range(steps)]
    v, r = values[:, 0].tolist(), rewards[:, 0].tolist()
    bootstrap = [0.0 if ends[t] else v[t + 1] for t in range(steps)]

    def target(s: int, last: int) -> float:
        total, product = v[s], 1.0
        for t in range(s, last + 1):
            total += gamma ** (t - s) * product * min(most_rho, ratio[t]) * (r[t] + gamma * bootstrap[t] - v[t])
            product *= lam * min(most_c, ratio[t])
        return total

    lasts = [2, 2, 2, 4, 4, 6, 6]  # of the episode that each step is in
    expected = [target(s, lasts[s]) for s in range(steps)]
    assert targets[:, 0].tolist() == pytest.approx(expected)
    following = [bootstrap[s] if s == lasts[s] else expected[s + 1] for s in range(steps)]
    better = [min(most_rho, ratio[s]) * (r[s] + gamma * following[s] - v[s]) for s in range(steps)]
    assert advantages[:, 0].tolist() == pytest.approx(better)


@pytest.mark.usefixtures("examples")
def test_without_lag_vtrace_is_the_n_step_return_of_a3c() -> None:
    from cartpole_a3c import advantages
    from cartpole_env import REWARD, Actor, ActorCritic
    from cartpole_impala import vtrace

    torch.manual_seed(0)
    model = ActorCritic(8)
    actor = Actor(3, seed=1)
    played = actor.act(model, 60, version=4)
    assert played.version == 4
    assert played.observations.shape == (61, 3, 4)
    assert played.cuts.any()
    begun_anew = torch.roll(played.cuts, 1, dims=0)
    begun_anew[0] = False
    assert torch.equal(played.valid, ~begun_anew)
    lengths = actor.returns
    assert all(8 <= length < 60 for length in lengths)
    assert played.samples == round(float(played.rewards.sum()) / REWARD) == 180 - int(begun_anew.sum())

    values = model(played.observations)[1].detach()
    targets, better = vtrace(played, played.log_probs, values, 0.9)
    expected = advantages(played, values, 0.9, 1.0)
    torch.testing.assert_close((targets - values[:-1])[played.valid], expected[played.valid])
    torch.testing.assert_close(better[played.valid], expected[played.valid])


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("name", ["cartpole_a3c", "cartpole_impala"])
def test_each_example_runs_alone(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = __import__(name)
    arguments = ["--updates", "12", "--envs", "4", "--n-steps", "8", "--print-every", "4"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["update", "4"], ["update", "8"], ["update", "12"]]
    assert lines[-1].startswith("final mean return ")
