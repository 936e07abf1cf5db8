"""The arithmetic of rounds: means in memory that is used again, and what counts as finite."""

from __future__ import annotations

import math

import pytest
import torch

from downpour_server.tensors import Scratch, is_finite, weighted_mean

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for at in (0, 500, 999):
        tensor = torch.ones(1000, dtype=dtype)
        assert is_finite(tensor)
        tensor[at] = bad
        assert not is_finite(tensor)
    assert not is_finite(torch.tensor([math.inf, -math.inf], dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_elements_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.zeros(0, dtype=dtype))


def test_integers_are_finite() -> None:
    assert is_finite(torch.tensor([1, 1 << 62]))
    assert is_finite(torch.tensor([True]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mean_is_what_it_was_made_of_fresh_memory(dtype: torch.dtype) -> None:
    scratch = Scratch()
    for numel in (7, 100, 3):
        parts = [torch.linspace(-3, 5 + i, numel).to(dtype) for i in range(3)]
        kept = [part.clone() for part in parts]
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        expected = parts[0].to(wide) * (1 / 10)
        expected.add_(parts[1].to(wide), alpha=3 / 10).add_(parts[2].to(wide), alpha=6 / 10)
        mean = weighted_mean(parts, [1, 3, 6], scratch)
        assert mean.dtype == dtype
        assert torch.equal(mean, expected.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True)), "the parts stay as they are"


def test_means_of_one_size_lie_in_the_same_memory() -> None:
    scratch = Scratch()
    places = {weighted_mean([torch.ones(9), torch.zeros(9)], [1, n], scratch).data_ptr() for n in range(5)}
    assert len(places) == 1


def test_a_mean_of_one_is_that_one_and_weights_of_zero_count_equally() -> None:
    one = torch.tensor([0.1, 0.3])
    assert weighted_mean([one], [7], Scratch()) is one
    assert weighted_mean([torch.zeros(2), torch.ones(2)], [0, 0], Scratch()).tolist() == [0.5, 0.5]
