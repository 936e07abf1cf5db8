"""Who trains which samples: leases, passes split by rounds, and where in the data a job is."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_kit import Job, through_json
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.messages import Refusal
from downpour_coordinator.data import PASSES_KEPT, DataState

# ---------------------------------------------------------------- leases


def test_all_workers_together_do_every_position_of_a_pass_once() -> None:
    job = Job(3).start()
    had: list[int] = []
    while True:
        before = len(had)
        for slot in range(3):
            had += job.work(slot, 1)
        if len(had) == before:
            break
    assert sorted(had) == list(range(32))
    assert job.state.data_position() == (1, [])


def test_what_a_worker_held_when_it_ended_goes_to_the_others() -> None:
    job = Job(2).start()
    lost = job.lease(0)
    assert isinstance(lost, m.Lease)
    job.carry_out(job.state.worker_lost(0))
    had = job.work(1, 40)
    assert sorted(had) == list(range(32)), "what worker 0 held is among it"


def test_loaders_and_passes_have_their_own_ledgers() -> None:
    job = Job().start()
    for fields in ({"epoch": 0}, {"epoch": 1}, {"epoch": 0, "loader": 1}):
        lease = job.lease(0, **fields)
        assert isinstance(lease, m.Lease)
        assert lease.start == 0


def test_a_pass_that_a_worker_left_early_is_free_for_the_others() -> None:
    job = Job().start()
    left = job.lease(0, epoch=0)
    assert isinstance(left, m.Lease)
    job.lease(0, epoch=1)
    again = job.lease(1, epoch=0)
    assert isinstance(again, m.Lease)
    assert again.start == left.start


@pytest.mark.parametrize("fields", [{"total": 31}, {"order": "another"}])
def test_a_worker_with_other_data_is_refused(fields: dict[str, Any]) -> None:
    job = Job().start()
    job.lease(0)
    refused = job.lease(1, **fields)
    assert isinstance(refused, m.Refused)
    assert refused.code == Refusal.DATA_DIFFERS
    assert "worker/1" in refused.reason
    assert isinstance(job.lease(0), m.Lease), "the others go on"


# ---------------------------------------------------------------- where the data is


def test_the_data_position_is_the_earliest_pass_that_is_not_complete() -> None:
    job = Job(2).start()
    assert job.state.data_position() == (0, [])
    slow = job.lease(1)
    assert isinstance(slow, m.Lease)
    job.work(0, 40)
    epoch, done = job.state.data_position()
    assert epoch == 0
    assert (slow.start, slow.stop) not in done
    assert sum(b - a for a, b in done) == 32 - (slow.stop - slow.start)
    job.work(0, 1, epoch=1)
    assert job.state.data_position()[0] == 0, "worker 1 is still at it"
    job.lease(1, done=(slow.start, slow.stop))
    assert job.state.data_position()[0] == 1


def test_the_data_position_is_that_of_the_first_loader() -> None:
    job = Job().start()
    job.lease(0, loader=1, epoch=5, total=4, unit=4)
    assert job.state.data_position() == (0, [])


def test_a_resumed_pass_goes_on_where_it_was() -> None:
    job = Job(1, resume="folder", clock=9, epoch=3, done=((0, 20),)).start()
    assert job.state.data_position() == (3, [(0, 20)])
    assert job.work(0, 40, epoch=3) == list(range(20, 32))
    assert job.state.data_position() == (4, [])
    assert job.work(0, 40, epoch=4) == list(range(32)), "only that pass was begun before"


# ---------------------------------------------------------------- leavers and latecomers


def test_what_a_leaver_held_is_torn_until_another_takes_it() -> None:
    job = Job(2).start()
    held = job.lease(0)
    assert isinstance(held, m.Lease)
    job.work(1, 1)
    assert job.state.torn_samples() == 0
    job.goodbye(0, drained=True, torn=5)
    assert job.state.torn_samples() == 5 + held.stop - held.start
    job.work(1, 40)
    assert job.state.torn_samples() == 5, "what it gave back was trained after all"


def test_what_nobody_takes_stays_torn() -> None:
    job = Job(2).start()
    held = job.lease(0)
    assert isinstance(held, m.Lease)
    job.work(1, 40)
    job.carry_out(job.state.worker_lost(0))
    job.lease(1, epoch=1)
    assert job.state.torn_samples() == held.stop - held.start


def test_a_pass_left_early_is_not_torn() -> None:
    job = Job(1).start()
    job.lease(0)
    job.lease(0, epoch=1)
    assert job.state.torn_samples() == 0


def test_a_pass_that_was_done_long_ago_is_not_done_again() -> None:
    job = Job(2).start()
    for epoch in range(PASSES_KEPT + 3):
        assert job.work(0, 40, epoch) == list(range(32))
    assert job.work(1, 40, 0) == [], "a worker that was stuck meanwhile"
    assert job.state.data_position() == (PASSES_KEPT + 3, [])


def test_where_the_data_is_skips_what_is_complete() -> None:
    job = Job(2).start()
    job.lease(1)
    job.carry_out(job.state.worker_lost(1))
    job.work(0, 40)
    done = job.work(0, 2, epoch=1)
    job.replaced(1)
    job.lease(1, epoch=0)
    assert job.state.data_position() == (1, [(0, len(done))]), "worker 1 has not yet found out that pass 0 is over"


def test_a_pass_that_was_left_open_long_ago_can_be_completed() -> None:
    job = Job(2).start()
    left = job.lease(0)
    assert isinstance(left, m.Lease)
    for epoch in range(1, PASSES_KEPT + 3):
        job.work(0, 40, epoch)
    assert sorted(job.work(1, 40, 0)) == list(range(32))


def test_a_report_on_a_pass_that_nobody_has_begun_says_nothing_of_its_size() -> None:
    job = Job(2).start()
    job.lease(0, 0, 0, 0, order="", done=(0, 4))
    assert isinstance(job.lease(1), m.Lease)


@pytest.mark.parametrize(
    "fields", [{"unit": -1}, {"total": -1}, {"epoch": -1}, {"loader": -1}, {"done": (-1, 4)}], ids=repr
)
def test_a_lease_of_less_than_nothing_is_nonsense(fields: dict[str, Any]) -> None:
    job = Job(1).start()
    with pytest.raises(ProtocolError):
        job.lease(0, **fields)
    assert sorted(job.work(0, 40)) == list(range(32))


@pytest.mark.parametrize("done", [(0,), (0, 4, 8), (0, 1 << 62), (4, 0)], ids=repr)
def test_a_report_of_something_else_than_what_is_held_changes_nothing(done: tuple[int, ...]) -> None:
    job = Job(1).start()
    job.lease(0, done=done)
    assert job.state.data_position() == (0, [])


# ---------------------------------------------------------------- sync: passes split among the members


def _begin(slot: int, epoch: int, loader: int = 0) -> m.BeginPass:
    return m.BeginPass(1, "job-1", slot, 0, loader, epoch, 0)


def test_the_first_who_begins_a_pass_fixes_its_split() -> None:
    data = DataState()
    assert data.newest_split() is None
    assert data.split(_begin(3, 0), [0, 3, 5]) == (3, 1)
    assert data.split(_begin(5, 0), [3, 5]) == (3, 2)
    assert data.split(_begin(5, 1), [3, 5]) == (2, 1)
    assert data.split(_begin(3, 7, loader=1), [3, 5]) == (2, 0)
    assert data.newest_split() == 1


def test_old_splits_are_forgotten() -> None:
    data = DataState()
    for epoch in range(20):
        data.split(_begin(0, epoch), [0, 1])
        data.split(_begin(0, epoch, loader=1), [0, 1])
    assert len(data.splits) == 2 * (PASSES_KEPT + 1)
    assert data.newest_split() == 19


def test_a_joiner_learns_the_passes_of_all_loaders() -> None:
    data = DataState()
    assert data.epochs_of_others() == []
    data.split(_begin(0, 2), [0])
    data.split(_begin(0, 4, loader=3), [0])
    data.take(m.TakeLease(1, "job-1", 0, 0, 1, 6, 8, 4, "order", ()), 1)
    assert data.epochs_of_others() == [6, 0, 4]


# ---------------------------------------------------------------- census


@given(
    st.integers(0, 50),
    st.integers(1, 7),
    st.lists(st.tuples(st.sampled_from(["take", "done", "lose", "json", "next"]), st.integers(0, 9)), max_size=60),
)
def test_every_sample_of_every_pass_is_accounted_for(total: int, unit: int, events: list[tuple[str, int]]) -> None:
    """Done, held, free (some of it given back): whatever happens, also to the coordinator's process."""
    data = DataState()
    held: dict[int, list[tuple[int, int]]] = {}
    at = dict.fromkeys(range(3), 0)
    done: set[tuple[int, int]] = set()

    def take(slot: int, unit: int, *finished: int) -> None:
        lease = data.take(m.TakeLease(1, "job-1", slot, 0, 0, at[slot], total, unit, "order", finished), 3)
        assert not isinstance(lease, str)
        if lease[0] < lease[1]:
            held.setdefault(slot, []).append(lease)
            fresh = {(at[slot], n) for n in range(*lease)}
            assert not fresh & done, "it was trained already"
            assert not fresh & {(at[s], n) for s in held if s != slot for span in held[s] for n in range(*span)}

    for kind, dice in events:
        slot = dice % 3
        match kind:
            case "take":
                take(slot, unit)
            case "done" if held.get(slot):
                span = held[slot].pop(0)
                done |= {(at[slot], n) for n in range(*span)}
                take(slot, unit, *span)
            case "next":
                held.pop(slot, None)
                at[slot] += 1
            case "lose":
                data.release(slot)
                held.pop(slot, None)
            case "json":
                data = DataState.from_document(through_json(data.document()))
        for (_, epoch), ledger in data.ledgers.items():
            assert sum(b - a for a, b in ledger.done) == sum(1 for e, _ in done if e == epoch)
            parts = [*ledger.free, *ledger.done, *[s for spans in ledger.leased.values() for s in spans]]
            assert sum(b - a for a, b in parts) == total
        assert 0 <= data.returned() <= total * len(data.ledgers)
