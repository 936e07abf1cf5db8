"""The window of repeats against a model that remembers everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from downpour_server.dedup import DedupWindow, Seen


class Remembering:
    """What the window promises, with a set of all that was recorded.

    ``floor``: everything below is given up or seen. It moves past a gap when more than ``size`` were seen above it.
    """

    def __init__(self, first: int, size: int) -> None:
        self.recorded: set[int] = set()
        self.floor = first
        self.size = size

    def look(self, seq: int) -> Seen:
        if seq >= self.floor:
            return Seen.REPEAT if seq in self.recorded else Seen.NEW
        return Seen.REPEAT if self.floor - seq <= self.size else Seen.TOO_OLD

    def record(self, seq: int) -> None:
        self.recorded.add(seq)
        self._close_up()
        while len(above := [s for s in self.recorded if s >= self.floor]) > self.size:
            self.floor = min(above)
            self._close_up()

    def _close_up(self) -> None:
        while self.floor in self.recorded:
            self.floor += 1


@given(
    first=st.integers(0, 20),
    size=st.integers(1, 6),
    steps=st.lists(st.integers(-3, 40), max_size=60),
)
def test_window_agrees_with_a_model_that_remembers_everything(first: int, size: int, steps: list[int]) -> None:
    window, model = DedupWindow(first, size=size), Remembering(first, size)
    for step in steps:
        seq = first + step
        assert window.look(seq) is model.look(seq)
        if model.look(seq) is Seen.NEW:
            window.record(seq)
            model.record(seq)
        assert [window.look(s) for s in range(first - 10, first + 50)] == [
            model.look(s) for s in range(first - 10, first + 50)
        ]
        assert len(window.above) <= size, "memory is bounded whatever arrives"


@given(st.lists(st.integers(0, 60), max_size=200), st.integers(1, 8))
def test_nothing_is_ever_new_twice(arrivals: list[int], size: int) -> None:
    window = DedupWindow(size=size)
    applied: list[int] = []
    for seq in arrivals:
        if window.look(seq) is Seen.NEW:
            window.record(seq)
            applied.append(seq)
    assert len(applied) == len(set(applied))


@given(st.permutations(range(20)), st.lists(st.integers(0, 19), max_size=20))
def test_within_the_window_every_contribution_is_new_exactly_once(order: list[int], repeats: list[int]) -> None:
    window = DedupWindow(size=20)
    applied = set()
    for seq in [*order, *repeats]:
        if window.look(seq) is Seen.NEW:
            assert seq not in applied
            window.record(seq)
            applied.add(seq)
    assert applied == set(range(20))
    assert (window.next_seq, window.above) == (20, set()), "a window without gaps remembers one number only"


def test_looking_records_nothing() -> None:
    window = DedupWindow()
    assert window.look(0) is Seen.NEW
    assert window.look(0) is Seen.NEW


def test_what_came_before_the_start_clock_is_not_new() -> None:
    window = DedupWindow(100)
    assert window.look(100) is Seen.NEW
    assert window.look(99) is Seen.REPEAT
    assert window.look(36) is Seen.REPEAT
    assert window.look(35) is Seen.TOO_OLD


def test_a_gap_is_given_up_when_the_window_is_full() -> None:
    window = DedupWindow(size=3)
    for seq in (1, 2, 3):
        window.record(seq)
    assert window.look(0) is Seen.NEW, "still waited for"
    window.record(4)
    assert window.look(0) is not Seen.NEW, "given up: never applied later"
    assert window.look(5) is Seen.NEW
