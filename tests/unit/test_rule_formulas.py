"""The optimizers that torch does not have, against their papers' formulas written down once more in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from downpour import optim
from downpour_common.rules import optimizer_class

STEPS, SHAPE = 100, (7, 5)
Array = NDArray[np.float64]
Step = Callable[[int, Array, Array], Array]
"""Number of the step from 1, weights and gradient → weights."""


def lamb(lr: float, b1: float, b2: float, eps: float, decay: float) -> Step:
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)

    def step(t: int, w: Array, g: Array) -> Array:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w
        return w - lr * np.linalg.norm(w) / np.linalg.norm(u) * u

    return step


def lars(lr: float, momentum: float, decay: float, trust: float) -> Step:
    v = np.zeros(SHAPE)

    def step(_: int, w: Array, g: Array) -> Array:
        nonlocal v
        local = trust * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
        v = momentum * v + lr * local * (g + decay * w)
        return w - v

    return step


def ftrl(alpha: float, beta: float, l1: float, l2: float) -> Step:
    """As in the paper, which begins at w = 0."""
    n, z = np.zeros(SHAPE), np.zeros(SHAPE)

    def step(_: int, w: Array, g: Array) -> Array:
        nonlocal n, z
        sigma = (np.sqrt(n + g**2) - np.sqrt(n)) / alpha
        z, n = z + g - sigma * w, n + g**2
        return np.where(np.abs(z) <= l1, 0.0, -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / alpha + l2))

    return step


def lion(lr: float, b1: float, b2: float, decay: float) -> Step:
    m = np.zeros(SHAPE)

    def step(_: int, w: Array, g: Array) -> Array:
        nonlocal m
        c, m = b1 * m + (1 - b1) * g, b2 * m + (1 - b2) * g
        return w - lr * (np.sign(c) + decay * w)

    return step


CASES: dict[str, tuple[str, dict[str, Any], Step]] = {
    "LAMB": ("LAMB", {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}, lamb(0.02, 0.8, 0.99, 1e-6, 0.1)),
    "LARS": ("LARS", {"lr": 2.0, "trust": 0.01, "weight_decay": 0.05}, lars(2.0, 0.9, 0.05, 0.01)),
    "FTRL": ("FTRL", {"lr": 0.3, "beta": 0.5, "l1": 0.4, "l2": 0.1}, ftrl(0.3, 0.5, 0.4, 0.1)),
    "Lion": ("Lion", {"lr": 0.01, "weight_decay": 0.1}, lion(0.01, 0.9, 0.99, 0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_its_paper_says(case: str) -> None:
    name, options, formula = CASES[case]
    random = np.random.default_rng(3)
    expected = np.zeros(SHAPE) if name == "FTRL" else random.normal(size=SHAPE)
    weights = torch.nn.Parameter(torch.tensor(expected))
    made: Any = optimizer_class(name)
    optimizer = made([weights], **options)
    zeros = 0
    for t in range(1, STEPS + 1):
        gradient = random.normal(size=SHAPE) + 0.3 * expected
        expected = formula(t, expected, gradient)
        weights.grad = torch.tensor(gradient)
        optimizer.step()
        zeros += int((weights == 0).sum())
        np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert (zeros > 0) == (name == "FTRL"), "l1 makes exact zeros, nothing else does"


def test_ftrl_begins_where_the_weights_are_and_a_schedule_moves_the_rate_only() -> None:
    """Without l1 and l2 it is a gradient step with a rate per coordinate, from any weights and with any rates."""
    weights = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    optimizer = optim.FTRL([weights], lr=0.5)
    expected, n = weights.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(20):
        rate = optimizer.param_groups[0]["lr"] = 0.5 if step < 10 else 0.05
        gradient = torch.tensor([1.0, -0.5], dtype=torch.float64) * (step + 1)
        n += gradient**2
        expected -= rate / (1.0 + n.sqrt()) * gradient
        weights.grad = gradient
        optimizer.step()
        torch.testing.assert_close(weights.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 9)])
def test_muon_of_matrices_and_adamw_of_the_rest_are_torchs_own(shape: tuple[int, int], nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(s, generator=generator) for s in (shape, shape[:1], shape)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in first] for _ in range(2))
    groups = [{"params": ours[:2]}, {"params": ours[2:], "muon": False}]
    own = optim.MuonAdamW(groups, lr=0.02, adamw_ratio=0.1, nesterov=nesterov, weight_decay=0.1)
    muon = torch.optim.Muon(theirs[:1], lr=0.02, nesterov=nesterov, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs[1:], lr=0.002, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(STEPS):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (own, muon, adamw):
            optimizer.step()
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_norms_of_zero_leave_the_rate_as_it_is() -> None:
    for name in ("LAMB", "LARS"):
        weights = torch.nn.Parameter(torch.zeros(3))
        made: Any = optimizer_class(name)
        optimizer = made([weights], lr=0.5)
        weights.grad = torch.tensor([1.0, 0.0, -1.0])
        optimizer.step()
        torch.testing.assert_close(weights.detach(), torch.tensor([-0.5, 0.0, 0.5]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LAMB", {"betas": (0.9, 1.0)}),
        ("LARS", {"momentum": 1.0}),
        ("FTRL", {"l1": -1.0}),
        ("Lion", {"lr": float("nan")}),
        ("MuonAdamW", {"ns_steps": 100}),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any]) -> None:
    made: Any = optimizer_class(name)
    with pytest.raises(ValueError, match=next(iter(options))):
        made([torch.nn.Parameter(torch.zeros(2))], **options)


def test_they_are_found_where_the_documentation_says() -> None:
    assert sorted(optim.__all__) == ["FTRL", "LAMB", "LARS", "Lion", "MuonAdamW"]
    for name in optim.__all__:
        assert getattr(optim, name) is optimizer_class(name)
    with pytest.raises(AttributeError, match="it has LAMB"):
        _ = optim.Adam
