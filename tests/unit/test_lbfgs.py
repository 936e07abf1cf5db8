"""L-BFGS over in-memory vectors: the recursion and the line search against references, without messages."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from downpour_common.vectors import POINT, TRIAL, WEIGHTS, Commands, Op, operations
from downpour_coordinator.lbfgs import Evaluate, History, Options, Progress, minimise
from downpour_coordinator.linesearch import C1, C2, strong_wolfe

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


class Machine:
    """Carries out what the algorithm asks for, in float64 and in one place."""

    def __init__(self, start: np.ndarray, function: Function) -> None:
        self.vectors = {WEIGHTS: start.astype(float)}
        self.function = function
        self.losses: list[float] = []

    def run(self, options: Options, history: int = 10) -> tuple[str, Progress]:
        progress = Progress()
        algorithm = minimise(options, progress, history, 1)
        ask = next(algorithm)
        try:
            while True:
                ask = algorithm.send(self.evaluate() if isinstance(ask, Evaluate) else self.execute(ask))
        except StopIteration as end:
            return end.value, progress

    def evaluate(self) -> list[float]:
        with np.errstate(all="ignore"):
            loss, gradient = self.function(self.vectors[WEIGHTS])
        self.vectors[TRIAL] = gradient
        self.losses.append(loss)
        return [loss]

    def execute(self, commands: Commands) -> list[float]:
        v, scalars, results = self.vectors, iter(commands.scalars), []
        for op, target, first, last in operations(commands.ops):
            match op:
                case Op.BEGIN:
                    v[POINT] = v[WEIGHTS].copy()
                case Op.COPY:
                    v[target] = v[first].copy()
                case Op.ZERO:
                    v[target] = np.zeros_like(v[WEIGHTS])
                case Op.SCALE:
                    v[target] = v[target] * next(scalars)
                case Op.AXPY:
                    for name in range(first, last + 1):
                        v[target] = v[target] + next(scalars) * v[name]
                case Op.DOT:
                    results += [float(v[target] @ v[name]) for name in range(first, last + 1)]
                case Op.MAXABS:
                    results.append(float(np.abs(v[target]).max()))
        return results


def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
    a, b = x[:-1], x[1:]
    gradient = np.zeros_like(x)
    gradient[:-1] = -400 * a * (b - a**2) - 2 * (1 - a)
    gradient[1:] += 200 * (b - a**2)
    return float((100 * (b - a**2) ** 2 + (1 - a) ** 2).sum()), gradient


def test_the_direction_is_that_of_the_two_loop_recursion() -> None:
    """Through rings that are not full, full and turned round several times, by explicit vectors."""
    rng = np.random.default_rng(3)
    history, pairs, old = History(4), {}, rng.normal(size=9)
    matrix = np.diag(rng.uniform(0.5, 3, 9))
    for number in range(11):
        slot = history.next_slot
        s = rng.normal(size=9)
        y = matrix @ s
        pairs[slot] = s, y
        g = old + y
        count = max(len(history.order), slot + 1)
        history.add(
            slot,
            [float(s @ pairs[j][1]) for j in range(count)],
            float(y @ y),
            [float(pairs[j][0] @ g) for j in range(count)],
            [float(pairs[j][1] @ g) for j in range(count)],
        )
        old = g
        q, alphas = g.copy(), {}
        for j in reversed(history.order):  # Nocedal & Wright, algorithm 7.4
            sj, yj = pairs[j]
            alphas[j] = (sj @ q) / (sj @ yj)
            q -= alphas[j] * yj
        r = q * (s @ y) / (y @ y)
        for j in history.order:
            sj, yj = pairs[j]
            r += sj * (alphas[j] - (yj @ r) / (sj @ yj))
        of_g, of_s, of_y = history.direction()
        found = of_g * g
        found = (
            found + sum(c * pairs[j][0] for j, c in enumerate(of_s)) + sum(c * pairs[j][1] for j, c in enumerate(of_y))
        )
        np.testing.assert_allclose(found, -r, rtol=1e-9, atol=1e-12)
        assert history.slope(float(g @ g), of_g, of_s, of_y) == pytest.approx(float(-r @ g), rel=1e-9)
        assert len(history.order) == min(4, number + 1)


@pytest.mark.parametrize("first", [1e-4, 0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    "curve",
    [
        lambda a: ((a - 2) ** 2, 2 * (a - 2)),
        lambda a: (-a / (a**2 + 2), (a**2 - 2) / (a**2 + 2) ** 2),  # Moré & Thuente 1994, function 1
        lambda a: (math.exp(min(a, 700)) - 9 * a, math.exp(min(a, 700)) - 9),
        lambda a: (-a - math.log(5 - a), -1 + 1 / (5 - a)) if a < 5 else (math.nan, math.nan),
        lambda a: (math.inf, math.nan) if a > 0.4 else (-a, -1.0 + a),
    ],
)
def test_a_line_search_ends_where_the_strong_wolfe_conditions_hold(
    curve: Callable[[float], tuple[float, float]], first: float
) -> None:
    loss, slope = curve(0.0)
    search, tried = strong_wolfe(loss, slope, first), []
    at = next(search)
    try:
        while True:
            tried.append(at)
            at = search.send(curve(at))
    except StopIteration as end:
        found = end.value
    assert found.at in tried
    assert found.loss <= loss + C1 * found.at * slope
    if curve(0.5)[0] != math.inf:  # that one falls until it cannot be computed any more
        assert abs(found.slope) <= C2 * -slope
    assert len(tried) <= 25


def test_a_quadratic_is_solved_exactly() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    matrix = basis @ np.diag(np.geomspace(1, 1e3, 20)) @ basis.T
    aim = rng.normal(size=20)
    machine = Machine(np.zeros(20), lambda x: (0.5 * (x - aim) @ matrix @ (x - aim), matrix @ (x - aim)))
    options = Options(1, 1, max_iterations=400, tolerance_grad=1e-9, tolerance_change=0, noise=1e-15)
    assert machine.run(options)[0] == "gradient"
    np.testing.assert_allclose(machine.vectors[WEIGHTS], aim, atol=1e-9)


@pytest.mark.parametrize("size", [2, 10, 50])
def test_rosenbrock_takes_no_more_evaluations_than_torch(size: int) -> None:
    start = np.tile([-1.2, 1.0], size // 2)
    machine = Machine(start, rosenbrock)
    options = Options(1, 1, max_iterations=500, tolerance_grad=1e-8, tolerance_change=0, noise=1e-15)
    reason, progress = machine.run(options)
    assert reason == "gradient"
    assert min(machine.losses) == progress.loss <= 1e-14

    x = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-8, tolerance_change=0, history_size=10, line_search_fn="strong_wolfe"
    )
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        theirs.zero_grad()
        loss = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        loss.backward()
        return loss

    theirs.step(closure)  # type: ignore[arg-type]
    assert progress.evaluations <= 1.25 * calls


def test_what_cannot_be_computed_makes_the_step_smaller() -> None:
    def barrier(x: np.ndarray) -> tuple[float, np.ndarray]:
        inside = x < 1
        return (float(-np.log(1 - x).sum() - 3 * x.sum()) if inside.all() else math.nan), 1 / (1 - x) - 3

    machine = Machine(np.array([-4.0, 0.9]), barrier)
    reason, _ = machine.run(Options(1, 1, lr=50.0, tolerance_grad=1e-8, tolerance_change=0, noise=1e-15))
    assert reason == "gradient"
    assert any(map(math.isnan, machine.losses))
    np.testing.assert_allclose(machine.vectors[WEIGHTS], 2 / 3, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_iterations": 3}, "iterations"),
        ({"max_evaluations": 7}, "evaluations"),
        ({"tolerance_change": 0.5}, "change"),
        ({"tolerance_grad": 1e3}, "gradient"),
    ],
)
def test_why_it_ends(options: dict[str, float], reason: str) -> None:
    machine = Machine(np.tile([-1.2, 1.0], 5), rosenbrock)
    told, progress = machine.run(Options(1, 1, **options))  # type: ignore[arg-type]
    assert told == reason
    assert progress.evaluations == len(machine.losses) <= 25
    np.testing.assert_array_equal(machine.vectors[WEIGHTS], machine.vectors[POINT])
    assert rosenbrock(machine.vectors[POINT])[0] == pytest.approx(progress.loss)


def test_a_slope_that_leads_nowhere_ends_it_well() -> None:
    machine = Machine(np.ones(3), lambda x: (1.0, np.ones(3)))  # the gradient is a lie
    assert machine.run(Options(1, 1, noise=0.0))[0] in ("change", "no-decrease")
    machine = Machine(np.ones(3), lambda _: (math.nan, np.ones(3)))
    assert machine.run(Options(1, 1))[0] == "not-finite"


def test_weight_decay_and_the_mean_are_the_shards_business() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=40)
    machine = Machine(np.zeros(6), lambda x: (0.5 * ((a @ x - b) ** 2).sum(), a.T @ (a @ x - b)))
    reason, progress = machine.run(
        Options(40, 1, weight_decay=0.3, tolerance_grad=1e-10, tolerance_change=0, noise=1e-15)
    )
    exact = np.linalg.solve(a.T @ a / 40 + 0.3 * np.eye(6), a.T @ b / 40)
    assert reason == "gradient"
    np.testing.assert_allclose(machine.vectors[WEIGHTS], exact, atol=1e-9)
    assert progress.loss == pytest.approx(0.5 * ((a @ exact - b) ** 2).mean() + 0.15 * exact @ exact)
