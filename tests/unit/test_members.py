"""Who belongs to a job, as a shard knows it, and what becomes of those who join, leave and are replaced."""

from __future__ import annotations

import pytest
import torch
from unit_kit import JOB, ShardDriver, model, refusal, tensor, values_of

from downpour_common import messages as m
from downpour_common.messages import Refusal
from downpour_server.members import Members

ONE = model(tensor("w", 4))


def ones(*values: float) -> torch.Tensor:
    """A vector of float32."""
    return torch.tensor(values, dtype=torch.float32)


def code(members: Members, slot: int, epoch: int) -> Refusal | None:
    """The code of the objection to a worker, if there is one."""
    objection = members.objection(slot, epoch)
    return objection[0] if objection else None


def driver(mode: str, workers: int = 2) -> ShardDriver:
    """One chunk of four zeros."""
    made = ShardDriver(ONE, mode, workers)
    made.init_all()
    return made


# ---------------------------------------------------------------- the list


def test_the_first_members_are_the_slots_of_the_start_whatever_their_epochs() -> None:
    members = Members(2)
    assert members.awaited() == [0, 1]
    assert [code(members, 0, 3), code(members, 0, 4), code(members, 0, 3)] == [None, None, Refusal.STALE_EPOCH]
    assert code(members, 2, 0) == Refusal.MALFORMED
    assert min(members.slots) == 0


def test_a_list_of_members_replaces_the_one_before() -> None:
    members = Members(2)
    change = members.replace(1, {1: 0, 7: 0})
    assert change is not None
    assert (change.joined, change.over, change.lost) == ({7}, {0}, {0})
    assert members.awaited() == [1, 7]
    assert min(members.slots) == 1
    assert code(members, 0, 0) == Refusal.STALE_EPOCH, "it was one"
    assert code(members, 0, 1) == Refusal.MALFORMED, "its successor is not one yet"
    assert code(members, 7, 0) is None
    assert code(members, 7, 1) == Refusal.MALFORMED


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_old_list_changes_nothing(version: int) -> None:
    members = Members(2)
    members.replace(2, {0: 0, 1: 0, 2: 0})
    assert members.replace(version, {0: 0}) is None
    assert members.awaited() == [0, 1, 2]
    assert members.version == 2


def test_a_newer_epoch_joins_in_place_of_the_old_one() -> None:
    members = Members(2)
    assert code(members, 1, 0) is None
    members.leave(1)
    members.end_epoch(0)
    change = members.replace(1, {0: 0, 1: 1})
    assert change is not None
    assert (change.joined, change.over, change.lost) == ({1}, {1}, set())
    assert members.awaited() == [1], "its marks are cleared, those of others are not"
    assert code(members, 1, 0) == Refusal.STALE_EPOCH
    assert code(members, 1, 1) is None


def test_one_that_said_leave_stays_left_while_the_list_still_names_it() -> None:
    members = Members(2)
    members.objection(1, 0)
    members.leave(1)
    members.replace(1, {0: 0, 1: 0, 2: 0})
    assert members.awaited() == [0, 2]


def test_one_that_has_not_spoken_yet_does_not_join_when_it_is_named() -> None:
    """It was there from the start, so its clock counts from there."""
    change = Members(2).replace(1, {0: 5, 1: 5})
    assert change is not None
    assert not change.joined


def test_a_removed_slot_may_come_back() -> None:
    members = Members(2)
    members.replace(1, {0: 0})
    change = members.replace(2, {0: 0, 1: 1})
    assert change is not None
    assert change.joined == {1}
    assert members.awaited() == [0, 1]
    assert code(members, 1, 0) == Refusal.STALE_EPOCH


# ---------------------------------------------------------------- at the shard


def test_a_stranger_is_refused_until_it_is_a_member() -> None:
    d = driver("async")
    assert refusal(d.hello(slot=5)) == (Refusal.MALFORMED, "slot 5 is not a member of the job")
    d.members(1, (0, 0), (1, 0), (5, 0))
    assert isinstance(d.hello(slot=5), m.HelloReply)
    assert values_of(d.push_pull(0, 5, 0, ones(1, 0, 0, 0))) == [1, 0, 0, 0]


@pytest.mark.parametrize("epochs", [[(0, 0)], [(0, 0), (1, 1)]], ids=["removed", "replaced"])
def test_a_zombie_is_refused_whatever_it_says(epochs: list[tuple[int, int]]) -> None:
    d = driver("async")
    d.push(0, 1, 0, ones(1, 0, 0, 0))
    d.members(1, *epochs)
    for request in (
        m.Hello(d.number(), JOB, 1, 0, d.layout.digest),
        m.Pull(d.number(), JOB, 1, 0, 0),
        d.pushed(0, 1, 1, ones(1, 1, 1, 1)),
        d.pushed(0, 1, 0, ones(1, 1, 1, 1), fetch=False),
        m.EndEpoch(d.number(), JOB, 1, 0),
        m.Leave(d.number(), JOB, 1, 0),
    ):
        found, reason = refusal(d.send(request))
        assert found == Refusal.STALE_EPOCH, request
        assert "worker/1" in reason
    assert d.weights().tolist() == [1, 0, 0, 0]


def test_a_round_goes_on_without_a_lost_worker_and_with_what_it_had_sent() -> None:
    d = driver("sync", 3)
    held = d.pushed(0, 0, 0, ones(4, 0, 0, 0))
    lost = d.pushed(0, 1, 0, ones(0, 4, 0, 0))
    assert d.send(held) is d.send(lost) is None
    d.members(1, (0, 0), (1, 0))
    assert values_of(d.answers[held.request]) == [2, 2, 0, 0]
    ahead = d.pushed(0, 1, 1, ones(0, 0, 2, 0))
    assert d.send(ahead) is None
    d.members(2, (0, 0))
    assert refusal(d.answers[ahead.request])[0] == Refusal.STALE_EPOCH
    assert values_of(d.push_pull(0, 0, 1, ones(0, 0, 0, 2))) == [2, 2, 1, 1]


def test_a_lost_worker_lets_ssp_go_on() -> None:
    d = driver("ssp:0")
    held = d.pushed(0, 0, 0, ones(1, 0, 0, 0))
    assert d.send(held) is None
    d.members(1, (0, 0))
    assert values_of(d.answers[held.request]) == [1, 0, 0, 0]


def test_the_end_of_an_epoch_is_answered_when_the_rest_is_lost() -> None:
    d = driver("sync", 3)
    requests = [d.end_epoch(0), d.end_epoch(1)]
    d.members(1, (0, 0), (2, 0))
    assert refusal(d.answers[requests[1]])[0] == Refusal.STALE_EPOCH
    assert requests[0] not in d.answers
    d.members(2, (0, 0))
    assert isinstance(d.answers[requests[0]], m.Ack)


def test_a_worker_that_joins_between_two_passes_is_in_every_round_from_then_on() -> None:
    d = driver("sync", 2)
    for slot in (0, 1):
        d.push(0, slot, 0, ones(0, 0, 0, 2))
    for slot in (0, 1):
        d.end_epoch(slot)
    d.members(1, (0, 0), (1, 0), (2, 0))
    hello = d.hello(slot=2)
    assert isinstance(hello, m.HelloReply)
    assert hello.clock == 1, "the round that is open"
    assert d.push_pull(0, 0, 1, ones(3, 0, 0, 0)) is None
    assert d.push_pull(0, 1, 1, ones(0, 3, 0, 0)) is None
    assert values_of(d.push_pull(0, 2, 1, ones(0, 0, 3, 0))) == [1, 1, 1, 2]
    assert d.push_pull(0, 2, 1, ones(9, 9, 9, 9)) is not None, "a repeat"
    assert d.push_pull(0, 2, 2, ones(0, 0, 0, 0)) is None


def test_one_that_has_left_is_taken_over_only_if_that_is_said() -> None:
    for said in ((), (1,)):
        members = Members(2, take_over=True)
        members.objection(1, 0)
        members.leave(1)
        change = members.replace(1, {0: 0, 1: 1}, said)
        assert change is not None
        assert (1 in change.taken_over, 1 in change.joined) == (bool(said), not said)
        assert members.awaited() == ([0] if said else [0, 1]), "who has left has left, whoever says it again"


def test_a_worker_that_comes_after_one_that_has_left_begins_anew_and_what_that_one_sent_does_not_count() -> None:
    d = driver("sync", 2)
    d.push(0, 1, 0, ones(9, 9, 9, 9))
    d.leave(1)
    d.members(1, (0, 0), (1, 1))
    assert d.push_pull(0, 0, 0, ones(2, 0, 0, 0)) is None
    assert values_of(d.push_pull(0, 1, 0, ones(0, 2, 0, 0), worker_epoch=1)) == [1, 1, 0, 0]
    waiting = d.pushed(0, 1, 1, ones(0, 2, 0, 0), worker_epoch=1)
    assert d.send(waiting) is None, "not taken for what its predecessor had done"


def test_buffers_of_a_lost_worker_leave_the_mean_and_those_of_a_leaver_stay() -> None:
    d = ShardDriver(model(tensor("mean", 1, kind="buffer")), "async", 3)
    d.init_all()
    for slot, value in enumerate((3.0, 6.0, 9.0)):
        d.push(0, slot, 0, ones(value))
    d.leave(1)
    d.members(1, (0, 0))
    d.push(0, 0, 1, ones(0.0))
    assert d.weights().tolist() == [3.0]


def test_the_chief_that_is_waited_for_is_the_lowest_member() -> None:
    d = ShardDriver(ONE, "sync", 3)
    d.members(1, (1, 0), (2, 0))
    d.pull(0, slot=2)
    assert "initial weights of worker/1" in refusal(d.tick(11.0)[0])[1]


# ---------------------------------------------------------------- the clock of one who joins (ssp)


def test_one_who_joins_ssp_begins_where_the_slowest_is_on_all_chunks_alike() -> None:
    d = ShardDriver(model(tensor("w", 8)), "ssp:1", 2, chunk_bytes=16)
    d.init_all()
    d.shard.start_from(100)
    for seq in (100, 101, 102):
        d.push(0, 0, seq, ones(0, 0, 0, 0))
        d.push(0, 1, seq, ones(0, 0, 0, 0))
        d.push(1, 0, seq, ones(0, 0, 0, 0))
    d.push(1, 1, 100, ones(0, 0, 0, 0))
    d.members(1, (0, 0), (1, 0), (2, 0))
    hello = d.hello(slot=2)
    assert isinstance(hello, m.HelloReply)
    assert hello.clock == 103, "the chunk that is farthest: 3 clocks of the slowest"
    assert values_of(d.push_pull(0, 2, 103, ones(1, 0, 0, 0))) == [1, 0, 0, 0], "one ahead of the slowest"
    assert d.push_pull(0, 2, 104, ones(1, 0, 0, 0)) is None, "two ahead"
