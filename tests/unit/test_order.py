"""The order of a pass: the same in every worker, another in every epoch, and refused where it cannot be shared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from downpour.data.order import digest, pass_order, units
from downpour_common.errors import ModelError

DATA = TensorDataset(torch.arange(60))


def loader(**options: Any) -> DataLoader[Any]:
    """A loader as a script would make it."""
    return DataLoader(DATA, **{"batch_size": 4, **options})


def order(of: DataLoader[Any], seed: int = 1, index: int = 0, epoch: int = 0) -> list[Any]:
    """The pass' order as plain values."""
    return [
        list(map(int, unit)) if isinstance(unit, list) else int(unit) for unit in pass_order(of, seed, index, epoch)
    ]


SHUFFLED: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffle": lambda: loader(shuffle=True),
    "shuffle with a generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "no batches": lambda: loader(shuffle=True, batch_size=None),
    "random sampler": lambda: loader(sampler=RandomSampler(DATA)),
    "with replacement": lambda: loader(sampler=RandomSampler(DATA, replacement=True)),
    "some of them": lambda: loader(sampler=RandomSampler(DATA, num_samples=30)),
    "subset": lambda: loader(sampler=SubsetRandomSampler(range(10, 40))),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0] * 60, 60)),
    "weighted with a generator": lambda: loader(
        sampler=WeightedRandomSampler([1.0] * 60, 60, generator=torch.Generator().manual_seed(9))
    ),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 7, False)),
}


@pytest.mark.parametrize("kind", SHUFFLED)
def test_every_worker_sees_the_same_order_whatever_else_it_drew(kind: str) -> None:
    """Each worker makes its own loader, and its random state is its own."""
    torch.manual_seed(1)
    first = order(SHUFFLED[kind](), epoch=3)
    torch.manual_seed(2)
    torch.rand(17)
    mine = SHUFFLED[kind]()
    order(mine, epoch=2)
    assert order(mine, epoch=3) == first, "whatever passes it went through before"


@pytest.mark.parametrize("kind", SHUFFLED)
def test_epochs_seeds_and_loaders_have_orders_of_their_own(kind: str) -> None:
    mine = SHUFFLED[kind]()
    orders = [order(mine, *of) for of in ((1, 0, 0), (1, 0, 1), (2, 0, 0), (1, 1, 0))]
    assert len({str(o) for o in orders}) == 4


def test_a_shuffled_pass_holds_every_sample_once() -> None:
    assert sorted(order(loader(shuffle=True))) == list(range(60))
    assert sorted(order(SHUFFLED["subset"]())) == list(range(10, 40))
    assert sorted(n for batch in order(SHUFFLED["batch sampler"]()) for n in batch) == list(range(60))


def test_a_loader_that_does_not_shuffle_keeps_its_order() -> None:
    assert order(loader()) == list(range(60))
    assert order(loader(), seed=2, epoch=9) == list(range(60))


def test_a_sampler_with_a_fixed_order_is_taken_as_it_is() -> None:
    assert order(loader(sampler=[3, 1, 2])) == [3, 1, 2]
    batches = DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 25, True))
    assert order(batches) == [list(range(25)), list(range(25, 50))]


def test_what_is_shared_out_is_samples_or_the_scripts_own_batches() -> None:
    sampler = RandomSampler(DATA)
    batches = BatchSampler(sampler, 7, False)
    assert units(loader(sampler=sampler)) is sampler
    assert units(DataLoader(DATA, batch_sampler=batches)) is batches


class _Unseedable(Sampler[int]):
    """Shuffles with Python's own random numbers."""

    def __iter__(self) -> Iterator[int]:
        numbers = list(range(60))
        random.shuffle(numbers)
        return iter(numbers)

    def __len__(self) -> int:
        return 60


class _UnseedableBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(10):
            yield torch.randperm(60)[:6].tolist()

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize(
    "make",
    [lambda: loader(sampler=_Unseedable()), lambda: DataLoader(DATA, batch_sampler=_UnseedableBatches())],
    ids=["sampler", "batch sampler"],
)
def test_an_order_that_nobody_can_seed_is_refused_with_a_way_out(make: Callable[[], DataLoader[Any]]) -> None:
    with pytest.raises(ModelError, match=r"_Unseedable.*generator=torch\.Generator\(\)"):
        order(make())


def test_asking_for_an_order_leaves_torchs_own_random_numbers_alone() -> None:
    """Dropout of a worker must not depend on how often the order was asked for."""
    for kind, make in SHUFFLED.items():
        mine = make()
        torch.manual_seed(3)
        before = torch.get_rng_state()
        order(mine)
        assert torch.equal(torch.get_rng_state(), before), kind


@pytest.mark.parametrize("kind", SHUFFLED)
def test_equal_orders_have_equal_digests_and_others_have_not(kind: str) -> None:
    mine, theirs = SHUFFLED[kind](), SHUFFLED[kind]()
    assert digest(pass_order(mine, 1, 0, 0)) == digest(pass_order(theirs, 1, 0, 0))
    assert digest(pass_order(mine, 1, 0, 0)) != digest(pass_order(mine, 1, 0, 1))


def test_plain_orders_of_different_lengths_have_different_digests() -> None:
    assert digest(range(5)) != digest(range(6))
    assert digest([1, 2, 3]) != digest([1, 3, 2])
