"""Batches as all ranks of a replica get them, and where a rank stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from downpour.parallel.group import Group, Place
from downpour.parallel.relay import Relay, Word
from downpour_common.errors import ModelError
from ranks import run_ranks


def batches() -> list[Any]:
    return [
        (torch.arange(6, dtype=torch.float32).view(2, 3), torch.tensor([1, 0])),
        {"ids": torch.arange(4).view(2, 2), "mask": torch.tensor([True, False]), "name": "é", "w": 0.5, "none": None},
        [torch.tensor(3.5, dtype=torch.float64), [torch.zeros(0, 7, dtype=torch.bfloat16)], (np.arange(3),)],
        torch.arange(12, dtype=torch.float32).view(3, 4).t(),
        (),
    ]


WORDS = [Word(2, (1, 64)), Word(2, stop=True), Word(7), Word(leave=True), Word(over=True)]


def _relay(group: Group) -> list[str]:
    relay, found = Relay(group), []
    for given in zip(WORDS, batches(), strict=True):
        if group.place.rank == 0:
            relay.give(*given)
        word, batch = given if group.place.rank == 0 else relay.take()
        found.append(f"{word} {batch}")
    with pytest.raises(ModelError, match=r"a batch holds a builtins\.set"):
        relay.give(Word(), {1, 2})
    return found


@pytest.mark.process
@pytest.mark.long
def test_all_ranks_get_the_batch_of_the_lead() -> None:
    lead, second = run_ranks(_relay, (1, 1))
    arrays = lead[2].replace("(array([0, 1, 2]),)", "(tensor([0, 1, 2]),)")
    assert second == [*lead[:2], arrays, *lead[3:]]


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1, 1), (1, 2), (2, 3, 1)])
def test_each_rank_has_one_place(widths: tuple[int, ...]) -> None:
    places = [Place(rank, widths) for rank in range(sum(widths))]
    assert [p.rank for p in places] == [p.head_of(p.stage) + p.tensor_rank for p in places]
    assert [p.rank in p.ranks_of(p.stage) and p.width == widths[p.stage] for p in places] == [True] * len(places)
    assert [len(Place(0, widths).ranks_of(s)) for s in range(len(widths))] == list(widths)
