"""A Pull that is to come after a contribution: it waits for what the answer to a push-pull would wait for."""

from __future__ import annotations

import torch
from unit_kit import ShardDriver, model, tensor, values_of

ONE = model(tensor("weight", 4))
STEP = torch.tensor([1.0, 0.0, 0.0, 0.0])


def driver(mode: str) -> ShardDriver:
    made = ShardDriver(ONE, mode)
    made.init_all()
    return made


def test_in_ssp_it_waits_for_the_slowest_as_far_as_the_bound_says() -> None:
    d = driver("ssp:1")
    d.push(0, 0, 0, STEP)
    assert values_of(d.pull(0, after=0)) == [1, 0, 0, 0]
    d.push(0, 0, 1, STEP)
    assert d.pull(0, after=1) is None
    held = d.number() - 1
    d.push(0, 1, 0, STEP)
    assert values_of(d.answers[held]) == [3, 0, 0, 0]
    assert d.shard.stats.clock_gap_max == 1


def test_in_sync_it_waits_for_the_round_and_in_async_for_nobody() -> None:
    d = driver("sync")
    d.push(0, 0, 0, STEP)
    assert d.pull(0, after=0) is None
    held = d.number() - 1
    d.push(0, 1, 0, STEP)
    assert values_of(d.answers[held]) == [1, 0, 0, 0]
    free = driver("async")
    assert values_of(free.pull(0, after=7)) == [0, 0, 0, 0]


def test_a_leaver_lets_it_go() -> None:
    d = driver("ssp:0")
    d.push(0, 0, 0, STEP)
    assert d.pull(0, after=0) is None
    held = d.number() - 1
    d.leave(1)
    assert values_of(d.answers[held]) == [1, 0, 0, 0]
