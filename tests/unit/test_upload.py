"""Sending a file in parts: in order, a few at a time, on from where the other side is, and quiet while it is away."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_server import upload
from downpour_server.upload import ASK_S, PART_BYTES, STUCK, WINDOW, Part, Upload


class Desk:
    """The coordinator's side: bytes held, told apart by their offsets only."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, part: Part) -> int:
        """As PROTOCOL.md says: what leaves a gap is not taken, what is held already is held already."""
        if part.offset <= self.held:
            self.held = max(self.held, part.offset + part.length)
        return self.held


def started(total: int) -> Upload:
    return Upload(total, itertools.count(1))


def test_parts_are_in_order_and_only_a_few_under_way() -> None:
    u = started(6 * PART_BYTES + 5)
    parts = u.outgoing(0.0)
    assert parts == [Part(n + 1, n * PART_BYTES, PART_BYTES) for n in range(WINDOW)]
    assert u.outgoing(0.1) == []
    u.acknowledged(1, PART_BYTES, 0.1)
    assert u.outgoing(0.1) == [Part(5, 4 * PART_BYTES, PART_BYTES)]
    for number in (2, 3, 4, 5):
        u.acknowledged(number, number * PART_BYTES, 0.2)
    assert u.outgoing(0.2) == [Part(6, 5 * PART_BYTES, PART_BYTES), Part(7, 6 * PART_BYTES, 5)]
    u.acknowledged(6, 6 * PART_BYTES, 0.3)
    assert not u.done
    u.acknowledged(7, 6 * PART_BYTES + 5, 0.3)
    assert u.done
    assert u.outgoing(9.0) == []


def test_while_nobody_answers_it_only_asks() -> None:
    u = started(9 * PART_BYTES)
    u.outgoing(0.0)
    asked = [part for second in range(1, 61) for part in u.outgoing(float(second))]
    assert [part.length for part in asked] == [0] * 30, "one small question every two seconds"
    assert len({part.request for part in asked}) == 1, "the same one"
    u.acknowledged(2, 2 * PART_BYTES, 61.0)
    assert u.outgoing(61.0) == [], "an answer from before it fell silent says nothing of now"
    u.acknowledged(asked[0].request, PART_BYTES, 61.5)
    assert [part.offset for part in u.outgoing(61.5)] == [n * PART_BYTES for n in (1, 2, 3, 4)]


def test_a_gap_sends_it_back_once() -> None:
    u = started(9 * PART_BYTES)
    u.outgoing(0.0)
    for number in (2, 3, 4):
        u.acknowledged(number, 0, 0.1)
    assert [part.offset for part in u.outgoing(0.1)] == [n * PART_BYTES for n in range(WINDOW)]
    assert u.outgoing(0.1) == []


def test_what_is_held_already_is_not_sent() -> None:
    u = started(9 * PART_BYTES)
    u.outgoing(0.0)
    u.acknowledged(1, 7 * PART_BYTES, 0.1)
    assert [part.offset for part in u.outgoing(0.1)] == [7 * PART_BYTES, 8 * PART_BYTES]


def test_a_coordinator_that_has_lost_what_it_held_gets_it_again() -> None:
    u = started(2 * PART_BYTES)
    u.outgoing(0.0)
    u.acknowledged(1, PART_BYTES, 0.1)
    u.acknowledged(2, 0, 0.1)
    assert not u.done
    assert [part.offset for part in u.outgoing(0.2)] == [0, PART_BYTES]


def test_a_refusal_ends_it() -> None:
    u = started(PART_BYTES)
    u.outgoing(0.0)
    u.refused(99, "not meant for this")
    assert not u.error
    u.refused(1, "no such snapshot")
    assert "no such snapshot" in u.error
    assert u.outgoing(10.0) == []
    assert not u.done


@pytest.mark.parametrize("held", [-1, PART_BYTES + 1])
def test_more_than_there_is_cannot_be_held(held: int) -> None:
    u = started(PART_BYTES)
    u.outgoing(0.0)
    u.acknowledged(1, held, 0.1)
    assert str(held) in u.error


def test_a_coordinator_that_takes_nothing_is_given_up() -> None:
    u = started(PART_BYTES)
    for _ in range(STUCK + 1):
        assert not u.error
        (part,) = u.outgoing(0.0)
        u.acknowledged(part.request, 0, 0.0)
    assert "takes no more than 0" in u.error


@given(
    total=st.integers(0, 40),
    fates=st.lists(st.sampled_from(["deliver", "lose", "lose answer", "twice", "wait", "restart"]), max_size=80),
)
def test_whatever_is_lost_or_comes_twice_all_of_it_arrives(total: int, fates: list[str]) -> None:
    """With parts of 4 bytes; a restarted desk has lost the last bytes that it held."""
    size, upload.PART_BYTES = upload.PART_BYTES, 4
    try:
        u, desk, now_s = started(total), Desk(), 0.0
        line: deque[Part] = deque()
        answers: deque[tuple[int, int]] = deque()
        for fate in [*fates, *["deliver", "wait"] * 60]:
            line.extend(u.outgoing(now_s))
            if fate == "wait":
                now_s += ASK_S
            elif fate == "restart":
                desk.held = max(0, desk.held - 3) if not u.done else desk.held
                line.clear()
                answers.clear()
            elif line:
                part = line.popleft()
                if fate != "lose":
                    for _ in range(2 if fate == "twice" else 1):
                        held = desk.take(part)
                        if fate != "lose answer":
                            answers.append((part.request, held))
            while answers:
                u.acknowledged(*answers.popleft(), now_s)
        assert not u.error
        assert u.done
        assert desk.held == total
    finally:
        upload.PART_BYTES = size
