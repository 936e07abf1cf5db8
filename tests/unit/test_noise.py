"""The noise scale that shards estimate, against problems whose noise scale is known; staleness by worker."""

from __future__ import annotations

import math

import pytest
import torch

from downpour_server.contribution import Contribution
from downpour_server.noise import FIRST_EVERY, HELD_BYTES, LAST_EVERY, LONGEST, NoiseMeter, estimates
from downpour_server.stats import ShardStats, bin_of

SIZE = 2000
TRUE = 4.0
"""tr(Σ) of one sample, where |G|² is 1: the noise scale in samples."""


class Problem:
    """Gradients with a known mean and known noise: |G|² = 1, tr(Σ) = ``scale``, spread over all elements."""

    def __init__(self, scale: float = TRUE, size: int = SIZE, dtype: torch.dtype = torch.float32) -> None:
        self._random = torch.Generator().manual_seed(3)
        self.mean = torch.randn(size, generator=self._random)
        self.mean /= self.mean.norm()
        self._spread = math.sqrt(scale / size)
        self._dtype = dtype

    def gradient(self, samples: int) -> torch.Tensor:
        """The mean gradient of so many samples."""
        noise = torch.randn(self.mean.numel(), generator=self._random)
        return (self.mean + noise * self._spread / math.sqrt(samples)).to(self._dtype)

    def round(self, *samples: int) -> list[Contribution]:
        """One contribution of each worker."""
        return [Contribution(slot, 0, b, 0, b"", self.gradient(b)) for slot, b in enumerate(samples)]


def scale_of(meter: NoiseMeter) -> float:
    trace, square, _ = meter.document()
    return trace / square


@pytest.mark.parametrize("samples", [(2, 2), (4, 4, 4, 4), (1, 2, 8)])
def test_rounds_tell_the_noise_scale_whatever_the_batches(samples: tuple[int, ...]) -> None:
    problem, meter = Problem(), NoiseMeter(True)
    for version in range(600):
        meter.look(0, version, problem.round(*samples))
    assert scale_of(meter) == pytest.approx(TRUE, rel=0.1)
    trace, square, looks = meter.document()
    assert (trace, square) == (pytest.approx(TRUE, rel=0.1), pytest.approx(1.0, rel=0.1))
    assert looks > 20


@pytest.mark.parametrize(("scale", "batch"), [(TRUE, 2), (100.0, 8), (0.5, 4)])
def test_contributions_that_are_applied_alone_are_compared_in_pairs(scale: float, batch: int) -> None:
    problem, meter = Problem(scale), NoiseMeter(True)
    for version in range(900):
        meter.look(0, version, problem.round(batch))
    assert scale_of(meter) == pytest.approx(scale, rel=0.15)


def test_the_estimates_have_no_bias() -> None:
    problem = Problem(size=50)
    found = [estimates([(b, problem.gradient(b)) for b in (1, 3)]) for _ in range(4000)]
    traces, squares = zip(*found, strict=True)
    assert sum(traces) / len(found) == pytest.approx(TRUE, rel=0.05)
    assert sum(squares) / len(found) == pytest.approx(1.0, rel=0.05)


def test_chunks_add_up() -> None:
    whole, parts = Problem(), NoiseMeter(True)
    for version in range(400):
        round_ = whole.round(2, 2)
        for chunk, (begin, end) in enumerate([(0, 300), (300, SIZE)]):
            cut = [Contribution(c.slot, 0, c.samples, 0, b"", c.gradient[begin:end]) for c in round_]
            parts.look(chunk, version, cut)
    assert scale_of(parts) == pytest.approx(TRUE, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    problem, meter = Problem(dtype=dtype), NoiseMeter(True)
    for version in range(300):
        meter.look(0, version, problem.round(2, 2, 2))
    assert scale_of(meter) == pytest.approx(TRUE, rel=0.15)


def test_few_updates_are_looked_at_and_fewer_as_the_training_goes_on() -> None:
    meter = NoiseMeter(True)
    problem = Problem(size=4)
    looks = []
    for version in range(20_000):
        meter.look(0, version, problem.round(1, 1) if version % 2 == 0 else [])
        looks.append(meter.document()[2])
    assert looks[0] == 1
    assert looks[999] <= 1000 / FIRST_EVERY / 2
    assert looks[-1] - looks[-5001] <= 5000 / LAST_EVERY + 1
    assert looks[-1] > LONGEST


def test_nothing_is_measured_where_it_is_not_wanted_or_nothing_comes() -> None:
    meter, unwanted = NoiseMeter(True), NoiseMeter(False)
    unwanted.look(0, 0, Problem(size=4).round(1, 1))
    meter.look(0, 0, [])
    assert meter.document() == unwanted.document() == [0.0, 0.0, 0]


def test_squares_that_overflow_are_left_out() -> None:
    meter = NoiseMeter(True)
    huge = [Contribution(slot, 0, 1, 0, b"", torch.full((4,), 1e30)) for slot in (0, 1)]
    meter.look(0, 0, huge)
    assert meter.document() == [0.0, 0.0, 0]


def test_contributions_are_held_within_bounds_and_as_they_were() -> None:
    meter = NoiseMeter(True)
    large = torch.ones(HELD_BYTES // 4 // 2 + 1)
    for chunk in (0, 1):
        meter.look(chunk, 0, [Contribution(0, 0, 1, 0, b"", large)])
    large.zero_()  # its worker goes on with its memory
    for chunk in (0, 1):
        meter.look(chunk, 1, [Contribution(0, 1, 1, 0, b"", torch.ones(large.numel()))])
    assert meter.document() == [pytest.approx(0.0, abs=1e-3), pytest.approx(large.numel()), 1]


# ---------------------------------------------------------------- staleness


def test_staleness_has_few_bins() -> None:
    bins = [bin_of(staleness) for staleness in range(18)]
    assert bins == [0, 1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6]


def test_staleness_is_counted_by_worker() -> None:
    stats = ShardStats()
    for slot, staleness in ((0, 0), (0, 0), (0, 7), (3, 2)):
        stats.apply(slot, staleness)
    assert stats.document()["slots"] == {"0": [7, 7, 2, 0, 0, 0, 1], "3": [2, 2, 0, 0, 1]}
    assert (stats.applied, stats.staleness) == (4, {0: 2, 2: 1, 7: 1})
