"""A contribution of no samples, of a step that a scaler skipped: it counts for its round, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from unit_kit import ShardDriver, model, tensor

from downpour_common import messages as m

ONE = model(tensor("w", 2))


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def driver(mode: str, workers: int) -> ShardDriver:
    made = ShardDriver(ONE, mode, workers)
    made.init_all()
    return made


@pytest.mark.parametrize("payload", [0.0, 5.0, math.nan, math.inf])
def test_the_others_of_the_round_count(payload: float) -> None:
    d = driver("sync", 2)
    assert d.push_pull(0, 0, 0, values(payload, payload), samples=0) is None
    assert isinstance(d.push_pull(0, 1, 0, values(1, 2), samples=3), m.Weights)
    assert d.weights().tolist() == [1, 2], "not a mean with something else"
    assert d.shard.stats.non_finite == {}
    assert d.shard.stats.applied == 1


@pytest.mark.parametrize(("mode", "workers"), [("sync", 1), ("async", 2), ("ssp:1", 2)])
def test_alone_it_is_an_update_that_changes_nothing(mode: str, workers: int) -> None:
    d = driver(mode, workers)
    d.push(0, 0, 0, values(1, 2))
    answer = d.push(0, 0, 1, values(math.inf, 7), samples=0)
    assert isinstance(answer, m.Ack)
    assert answer.version == 2
    assert d.weights().tolist() == [1, 2]
    d.push(0, 0, 1, values(math.inf, 7), samples=0)
    assert d.shard.stats.repeats == 1
    d.push(0, 0, 2, values(1, 1))
    assert d.weights().tolist() == [2, 3]
