"""Getting a file from the coordinator: windows, repeats, refusals, and what is not taken for a part of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_deploy.agent.download import PART_BYTES, WINDOW, Download
from downpour_deploy.agent.effects import Numbers


def download() -> Download:
    """A file of job-1."""
    return Download("job-1", "checkpoints/000001/manifest.json", Numbers(), 60.0, 0.0)


def answer(request: m.GetFile, size: int) -> m.FileData:
    """What a coordinator with a file of ``size`` bytes says; its bytes are zeros."""
    length = max(0, min(request.length, size - request.offset))
    return m.FileData(request.request, size, request.offset, bytes(length))


def test_the_first_part_tells_the_size_then_a_window_of_parts_is_under_way() -> None:
    size = 9 * PART_BYTES + 5
    file = download()
    [first] = file.outgoing(0.0)
    assert (first.job, first.path, first.offset, first.length) == ("job-1", file.path, 0, PART_BYTES)
    assert file.outgoing(1.0) == []
    part = file.received(answer(first, size), 1.0)
    assert part is not None
    assert len(file.outgoing(1.0)) == WINDOW - 1  # the first is still being written
    file.written(part, 1.0)
    assert len(file.outgoing(1.0)) == 1
    assert not file.complete


@given(st.integers(0, 6 * PART_BYTES + 3), st.integers(0, 1 << 32))
def test_every_byte_comes_once_whatever_is_lost_doubled_or_out_of_order(size: int, seed: int) -> None:
    file, now_s, chance = download(), 0.0, random.Random(seed)
    got = set()
    while not file.complete:
        assert now_s < 1000
        assert not file.error
        requests = file.outgoing(now_s)
        chance.shuffle(requests)
        for request in requests:
            assert request.length <= PART_BYTES
            for _ in range(chance.choice([0, 1, 2])):
                part = file.received(answer(request, size), now_s)
                if part is not None:
                    assert part.offset not in got
                    got.add(part.offset)
                    file.written(part, now_s)
        now_s += 1.0
    assert not file.error
    assert sorted(got) == list(range(0, max(1, size), PART_BYTES))


def test_a_part_that_does_not_come_is_asked_for_again_with_the_same_number() -> None:
    file = download()
    [first] = file.outgoing(0.0)
    assert file.outgoing(1.9) == []
    assert file.outgoing(2.0) == [first]
    assert file.outgoing(3.9) == []
    assert file.outgoing(4.0) == [first]


def test_what_is_being_written_is_not_asked_for_again() -> None:
    file = download()
    [first] = file.outgoing(0.0)
    assert file.received(answer(first, 10), 0.0) is not None
    assert file.outgoing(10.0) == []
    assert file.received(answer(first, 10), 10.0) is None
    assert not file.complete


def test_an_empty_file_is_a_file() -> None:
    file = download()
    part = file.received(answer(file.outgoing(0.0)[0], 0), 0.0)
    assert part is not None
    file.written(part, 0.0)
    assert file.complete
    assert not file.error
    assert file.outgoing(100.0) == []


def test_a_refusal_is_the_end_and_not_ready_is_not() -> None:
    file = download()
    [first] = file.outgoing(0.0)
    assert file.received(m.Refused(first.request, m.Refusal.NOT_READY, "a moment"), 0.0) is None
    assert file.outgoing(2.0) == [first]
    assert file.received(m.Refused(first.request, m.Refusal.UNKNOWN, "no such file"), 2.0) is None
    assert "no such file" in file.error
    assert file.outgoing(10.0) == []


def test_a_file_of_which_nothing_comes_is_given_up() -> None:
    file = download()
    [first] = file.outgoing(0.0)
    file.received(answer(first, 10 * PART_BYTES), 50.0)
    file.outgoing(109.0)
    assert not file.error
    assert file.outgoing(110.0) == []
    assert "60 s" in file.error


@pytest.mark.parametrize(
    "wrong",
    [
        m.FileData(2, 3 * PART_BYTES, PART_BYTES, bytes(PART_BYTES)),  # another size than before
        m.FileData(2, 2 * PART_BYTES, 0, bytes(PART_BYTES)),  # another place
        m.FileData(2, 2 * PART_BYTES, PART_BYTES, bytes(5)),  # too short
        m.FileData(2, 2 * PART_BYTES, PART_BYTES, bytes(PART_BYTES + 1)),  # too long
    ],
)
def test_answers_that_do_not_fit_are_not_written(wrong: m.FileData) -> None:
    file = download()
    part = file.received(answer(file.outgoing(0.0)[0], 2 * PART_BYTES), 0.0)
    assert part is not None
    file.written(part, 0.0)
    [second] = file.outgoing(0.0)
    assert second.request == 2
    assert file.received(wrong, 0.0) is None
    assert file.error


def test_answers_to_others_are_left_alone() -> None:
    file = download()
    file.outgoing(0.0)
    assert file.received(m.FileData(17, 1, 0, b"x"), 0.0) is None
    assert file.received(m.Refused(17, m.Refusal.UNKNOWN, "no"), 0.0) is None
    assert not file.error
