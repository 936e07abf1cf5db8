"""What counts as finished of a pass, and what as trained."""

from __future__ import annotations

from downpour.data.record import Part, PassRecord


def part(number: int) -> Part:
    """The number-th batch of 4."""
    return Part(4 * number, 4 * number + 4, 4)


def test_batches_are_finished_by_the_step_that_used_them() -> None:
    record = PassRecord()
    record.take(part(0))
    record.next_asked(learning=True)
    record.take(part(1))
    assert record.report() == [], "gradients are still being accumulated"
    record.stepped()
    assert (record.report(), record.trained) == ([(0, 8)], 8)
    assert record.report() == [], "once"


def test_without_gradients_the_next_batch_finishes_those_before() -> None:
    record = PassRecord()
    for number in (3, 5):
        record.take(part(number))
        record.next_asked(learning=False)
    assert (record.report(), record.trained) == ([(12, 16), (20, 24)], 0)


def test_a_complete_pass_is_finished_step_or_not() -> None:
    record = PassRecord()
    record.take(part(0))
    record.next_asked(learning=True)
    record.end(complete=True)
    record.end(complete=False)
    assert (record.report(), record.complete) == ([(0, 4)], True)


def test_of_a_pass_left_early_the_batch_at_hand_is_not_finished_unless_a_step_used_it() -> None:
    for stepped in (False, True):
        record = PassRecord()
        record.take(part(0))
        record.next_asked(learning=True)
        record.take(part(1))
        if stepped:
            record.stepped()
        record.end(complete=False)
        assert record.report() == [(0, 8 if stepped else 4)]
        assert not record.complete
