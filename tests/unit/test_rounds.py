"""Rounds of the synchronous modes: together, the workers take what one process with a larger batch would take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour.data.rounds import Round, RoundSplit

splits = {
    "total": st.integers(0, 200),
    "unit": st.integers(1, 9),
    "workers": st.integers(1, 5),
    "drop_last": st.booleans(),
    "rounds_before": st.integers(0, 6),
}


def everybody(total: int, unit: int, workers: int, drop_last: bool, offset: int) -> list[list[Round]]:
    """The parts of each worker."""
    return [list(RoundSplit(total, unit, workers, slot, drop_last, offset)) for slot in range(workers)]


@given(**splits)
def test_the_workers_parts_of_a_round_are_one_big_batch(
    total: int, unit: int, workers: int, drop_last: bool, rounds_before: int
) -> None:
    size = unit * workers
    offset = min(rounds_before * size, total)
    big = [range(low, min(low + size, total)) for low in range(offset, total, size)]
    if drop_last and big and len(big[-1]) < size:
        big.pop()
    parts = everybody(total, unit, workers, drop_last, offset)
    assert [len(mine) for mine in parts] == [len(big)] * workers
    for index, batch in enumerate(big):
        round_ = [parts[slot][index] for slot in range(workers)]
        together = [n for part in round_ for n in range(part.start, part.stop)]
        assert together == list(batch), "in slot order, without gap or overlap"
        sizes = [part.stop - part.start for part in round_]
        assert max(sizes) - min(sizes) <= 1, "evenly"
        assert max(sizes) <= unit
        assert {part.offset for part in round_} == {batch.stop}
        assert {part.last for part in round_} == {index == len(big) - 1}


@given(**splits)
def test_every_position_is_taken_once_but_for_what_is_dropped(
    total: int, unit: int, workers: int, drop_last: bool, rounds_before: int
) -> None:
    offset = min(rounds_before * unit * workers, total)
    taken = sorted(
        n for mine in everybody(total, unit, workers, drop_last, offset) for r in mine for n in range(r.start, r.stop)
    )
    left = total - offset
    kept = left - left % (unit * workers) if drop_last else left
    assert taken == list(range(offset, offset + kept))


@given(**splits)
def test_the_number_of_rounds_is_told_beforehand(
    total: int, unit: int, workers: int, drop_last: bool, rounds_before: int
) -> None:
    split = RoundSplit(total, unit, workers, workers - 1, drop_last, rounds_before * unit)
    assert split.rounds == len(list(split))


@given(**splits)
def test_a_pass_goes_on_after_a_round_as_if_it_had_not_stopped(
    total: int, unit: int, workers: int, drop_last: bool, rounds_before: int
) -> None:
    """``offset`` of a round is where a resumed job takes up the pass."""
    whole = list(RoundSplit(total, unit, workers, 0, drop_last))
    if len(whole) > rounds_before:
        at = whole[rounds_before].offset
        assert list(RoundSplit(total, unit, workers, 0, drop_last, at)) == whole[rounds_before + 1 :]


def test_the_last_round_is_split_evenly() -> None:
    assert [list(RoundSplit(14, 4, 2, slot, False))[-1] for slot in (0, 1)] == [
        Round(8, 11, 14, True),
        Round(11, 14, 14, True),
    ]


def test_the_last_round_is_dropped_where_the_loader_drops_its_last_batch() -> None:
    assert list(RoundSplit(14, 4, 2, 0, True)) == [Round(0, 4, 8, True)]


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_empty_pass_and_an_offset_past_the_end_have_no_rounds(drop_last: bool) -> None:
    assert list(RoundSplit(0, 4, 2, 0, drop_last)) == []
    assert list(RoundSplit(14, 4, 2, 0, drop_last, 20)) == []
