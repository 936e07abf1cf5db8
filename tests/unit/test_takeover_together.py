"""Where the ranks of a replica go on together, from where each of them could."""

from __future__ import annotations

from downpour.takeover import Beginning, together


def test_the_first_contribution_that_one_of_them_lacks_is_made_by_all() -> None:
    ahead, behind = Beginning(8, 2, (1, 64), (0, 0)), Beginning(7, 1, (1, 32), (0, 0))
    assert together([ahead, ahead, behind]) == Beginning(7, 2, (1, 32), (0, 0))
    assert together([behind, ahead, behind]) == Beginning(7, 1, (1, 32), (0, 0))


def test_who_knows_of_more_data_at_the_same_contribution_is_right() -> None:
    silent, told = Beginning(3, 0), Beginning(3, 0, (0, 96))
    assert together([silent, silent, told]).position == (0, 96)
    assert together([silent, silent]).position is None


def test_a_pass_is_finished_for_all_or_for_none() -> None:
    through, not_yet = Beginning(5, 0, (1, 0)), Beginning(4, 0, (0, 64))
    assert together([through, through]).finished == 0
    assert together([through, not_yet]).finished is None
