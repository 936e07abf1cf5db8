"""Trials by rehearsed times: what pays stays, what does not is left alone for longer each time."""

from __future__ import annotations

from typing import Literal

import pytest

from downpour.trial import BLOCK, BLOCKS, LONGEST, SHORTEST, Trial

Verdict = Literal["futile", "done", "none"]


class Steps:
    """A worker whose steps take as long as they are told, with and without."""

    def __init__(self, with_it_s: float, without_s: float, verdict: Verdict = "done") -> None:
        self.trial = Trial()
        self.with_it_s, self.without_s, self.verdict = with_it_s, without_s, verdict
        self.now_s = 1000.0

    def take(self, count: int) -> list[bool]:
        """Take steps; which of them were done with it."""
        done = []
        for _ in range(count):
            on = self.trial.on
            done.append(on)
            self.now_s += self.with_it_s if on else self.without_s
            self.trial.ended(self.now_s, self.verdict if on else "none")
        return done


def test_a_comparison_does_both_equally_often() -> None:
    done = Steps(1.0, 1.0).take(BLOCK * BLOCKS)
    assert sum(done) == len(done) // 2
    assert not done[0]


@pytest.mark.parametrize(("with_it_s", "expected"), [(0.5, True), (0.995, False), (1.05, False)])
def test_what_pays_stays(with_it_s: float, expected: bool) -> None:
    steps = Steps(with_it_s, 1.0)
    steps.take(BLOCK * BLOCKS)
    assert steps.take(SHORTEST) == [expected] * SHORTEST


def test_what_does_harm_is_not_compared_to_the_end() -> None:
    steps = Steps(1.5, 1.0)
    done = steps.take(2 * BLOCK + SHORTEST)
    assert sum(done) == BLOCK
    assert not steps.trial.on


def test_a_step_that_takes_long_for_another_reason_decides_nothing() -> None:
    steps = Steps(0.5, 1.0)
    steps.take(BLOCK + 2)
    steps.now_s += 500.0
    steps.take(BLOCK * BLOCKS - BLOCK - 2)
    assert steps.trial.on


def test_comparisons_become_rare_and_the_result_may_change() -> None:
    steps = Steps(2.0, 1.0)
    done = steps.take(20_000)
    assert sum(done) < 20_000 * BLOCK * BLOCKS // 2 // LONGEST + 10 * BLOCK * BLOCKS
    steps.with_it_s = 0.1
    done = steps.take(3 * LONGEST)
    assert done[-1]


def test_what_is_futile_is_left_at_once_and_tried_again() -> None:
    steps = Steps(0.1, 1.0, "futile")
    done = steps.take(5000)
    assert done.index(True) == BLOCK
    assert 3 <= sum(done) <= 12, "one step at a time, seldom"
    steps.verdict = "done"
    assert steps.take(3 * LONGEST)[-1]


def test_what_cannot_be_done_is_not_counted_as_quick() -> None:
    steps = Steps(0.1, 1.0, "none")
    steps.take(BLOCK * BLOCKS)
    assert not steps.trial.on
