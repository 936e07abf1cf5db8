"""The ledger of one pass: whatever happens to workers, every position is done exactly once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_coordinator.leases import LARGEST_LEASE, PassLedger, Span, complement, merge

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda p: (min(p), max(p))), max_size=8)


def positions(of: list[Span]) -> list[int]:
    """Every position in the spans, as often as it is there."""
    return sorted(n for start, stop in of for n in range(start, stop))


def census(ledger: PassLedger) -> None:
    """Free, leased and done positions are disjoint and are all there are."""
    leased = [span for held in ledger.leased.values() for span in held]
    assert positions([*ledger.free, *leased, *ledger.done]) == list(range(ledger.total))


@given(spans)
def test_merge_keeps_the_positions_and_joins_what_touches(some: list[Span]) -> None:
    merged = merge(some)
    assert positions(merged) == sorted(set(positions(some)))
    assert all(a < b for a, b in merged)
    assert all(first[1] < second[0] for first, second in pairwise(merged))


@given(spans, st.integers(60, 80))
def test_complement_is_what_is_left(some: list[Span], total: int) -> None:
    done = merge(some)
    assert positions([*done, *complement(done, total)]) == list(range(total))


@given(
    total=st.integers(0, 120),
    unit=st.integers(1, 9),
    workers=st.integers(1, 4),
    resumed=spans,
    events=st.lists(st.tuples(st.sampled_from(["grant", "finish", "release"]), st.integers(0, 99)), max_size=80),
)
def test_every_position_is_done_exactly_once_whatever_happens(
    total: int, unit: int, workers: int, resumed: list[Span], events: list[tuple[str, int]]
) -> None:
    """Workers take leases, finish them batch by batch in order, die, come back, and repeat old reports."""
    ledger = PassLedger.begin(total, "order", resumed)
    census(ledger)
    before = set(positions(ledger.done))
    assert before == {n for n in positions(resumed) if n < total}
    finished: Counter[int] = Counter()
    held: dict[int, list[Span]] = {slot: [] for slot in range(workers)}
    reports: list[tuple[int, Span]] = []
    for what, dice in [*events, *[("finish", 0), ("grant", 0)] * (2 * total + 2)]:
        slot = dice % workers
        if what == "grant":
            start, stop = ledger.grant(slot, unit, workers)
            assert (start == stop) == (not ledger.free and start == total) or start < stop
            if start < stop:
                held[slot] += [(at, min(at + unit, stop)) for at in range(start, stop, unit)]
        elif what == "finish" and held[slot]:
            batch = held[slot].pop(0)
            ledger.finish(slot, batch)
            finished.update(range(*batch))
            reports.append((slot, batch))
        elif what == "release":
            ledger.release(slot)
            held[slot].clear()
            if reports:
                ledger.finish(*reports[dice % len(reports)])  # a report that comes again counts for nothing
        census(ledger)
        assert set(finished) | before == set(positions(ledger.done))
    for slot in range(1, workers):
        ledger.release(slot)
        held[slot].clear()
    while (lease := ledger.grant(0, unit, workers))[0] < lease[1]:
        ledger.finish(0, lease)
        finished.update(range(*lease))
    assert ledger.closed
    assert finished == {n: 1 for n in range(total) if n not in before}, "each position once, none twice"


def test_leases_are_whole_batches_that_shrink_towards_the_end() -> None:
    ledger = PassLedger.begin(1003, "order", [])
    sizes = []
    while (lease := ledger.grant(0, 10, 2))[0] < lease[1]:
        sizes.append(lease[1] - lease[0])
    assert sum(sizes) == 1003
    assert all(size % 10 == 0 for size in sizes[:-1])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 10 * LARGEST_LEASE
    assert sizes[-2:] == [10, 3]


def test_what_a_worker_does_not_hold_it_cannot_finish() -> None:
    ledger = PassLedger.begin(20, "order", [])
    ledger.grant(0, 5, 2)
    for slot, span in [(1, (0, 5)), (0, (5, 10)), (0, (0, 6)), (0, (3, 3)), (0, (4, 2))]:
        ledger.finish(slot, span)
        assert ledger.done == []
        census(ledger)
    ledger.finish(0, (1, 3))
    assert ledger.done == [(1, 3)]
    census(ledger)


def test_nobody_gets_what_another_still_holds() -> None:
    ledger = PassLedger.begin(8, "order", [])
    while ledger.grant(0, 4, 1) != (8, 8):
        pass
    assert ledger.grant(1, 4, 1) == (8, 8)
    assert not ledger.closed
    ledger.release(0)
    assert ledger.grant(1, 4, 1) == (0, 4)


@pytest.mark.parametrize("resumed", [[], [(0, 7)], [(0, 3), (5, 100)]])
def test_a_resumed_pass_goes_on_with_what_was_not_done(resumed: list[Span]) -> None:
    ledger = PassLedger.begin(7, "order", resumed)
    granted = []
    while (lease := ledger.grant(0, 2, 1))[0] < lease[1]:
        granted.append(lease)
        ledger.finish(0, lease)
    assert positions(granted) == [n for n in range(7) if not any(a <= n < b for a, b in resumed)]
    assert ledger.closed


def test_an_empty_pass_is_closed() -> None:
    ledger = PassLedger.begin(0, "order", [])
    assert ledger.closed
    assert ledger.grant(0, 4, 1) == (0, 0)
