"""When contributions are applied and fetches answered, whatever the order in which they arrive."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour_common.modes import MODES, Mode
from downpour_server.contribution import Contribution
from downpour_server.members import Members
from downpour_server.policy import POLICIES
from downpour_server.policy.asynchronous import AsyncGate
from downpour_server.policy.stale import StaleGate
from downpour_server.policy.synchronous import SyncGate

NOTHING = torch.zeros(1)


def contribution(slot: int, seq: int) -> Contribution:
    """A contribution whose gradient does not matter."""
    return Contribution(slot, seq, 1, 0, b"", NOTHING)


def names(rounds: list[list[Contribution]]) -> list[list[tuple[int, int]]]:
    """Rounds as lists of (slot, seq)."""
    return [[(c.slot, c.seq) for c in round_] for round_ in rounds]


def test_every_mode_has_its_policy() -> None:
    assert set(POLICIES) == set(MODES)


# ---------------------------------------------------------------- members


def test_members_await_everybody_until_they_end_or_leave() -> None:
    members = Members(3)
    assert members.awaited() == [0, 1, 2]
    members.end_epoch(1)
    assert members.awaited() == [0, 2]
    members.leave(0)
    assert members.awaited() == [2]
    assert not members.turn_over()


def test_the_last_to_end_turns_the_epoch_over() -> None:
    members = Members(2)
    members.end_epoch(1)
    assert not members.turn_over()
    members.end_epoch(0)
    assert members.awaited() == [], "the gates see that nobody owes anything"
    assert members.turn_over()
    assert members.awaited() == [0, 1], "all are awaited again"
    assert not members.turn_over(), "once"


def test_a_leaver_ends_the_epoch_for_those_who_wait_and_is_not_awaited_again() -> None:
    members = Members(3)
    members.end_epoch(0)
    members.end_epoch(1)
    members.leave(2)
    assert members.turn_over()
    assert members.awaited() == [0, 1]


def test_leaving_alone_ends_no_epoch() -> None:
    members = Members(2)
    members.leave(0)
    members.leave(1)
    assert not members.turn_over(), "nobody waits for the end of an epoch"
    assert members.awaited() == []


def test_one_who_ended_and_then_left_counts_once() -> None:
    members = Members(2)
    members.end_epoch(0)
    members.leave(0)
    assert not members.turn_over()
    assert members.awaited() == [1]
    members.end_epoch(1)
    assert members.turn_over()
    members.end_epoch(1)
    members.leave(1)
    assert not members.turn_over(), "nobody is left to wait for the end"


# ---------------------------------------------------------------- async


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=20))
def test_async_applies_each_at_once_and_answers_at_once(arrivals: list[tuple[int, int]]) -> None:
    gate = AsyncGate(Mode("async"), Members(3))
    for slot, seq in arrivals:
        assert names(gate.offer(contribution(slot, seq))) == [[(slot, seq)]]
        assert gate.may_answer(slot, seq)
        assert gate.waits_for(slot, seq) == []
    assert gate.members_changed() == []


# ---------------------------------------------------------------- ssp


@dataclass
class Stepper:
    """Workers that contribute, wait for the answer, and only then go on."""

    workers: int
    bound: int
    first: int = 0
    clocks: list[int] = field(default_factory=list)
    """completed steps: contributed and answered"""
    contributed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = Members(self.workers)
        self.gate = StaleGate(Mode("ssp", self.bound), self.members)
        self.clocks = [0] * self.workers
        self.contributed = [0] * self.workers

    @property
    def live(self) -> list[int]:
        return self.members.awaited()

    def waiting(self, slot: int) -> bool:
        return self.contributed[slot] > self.clocks[slot]

    def act(self, slot: int) -> None:
        """``slot`` contributes, if it may."""
        if slot in self.live and not self.waiting(slot):
            seq = self.first + self.contributed[slot]
            assert names(self.gate.offer(contribution(slot, seq))) == [[(slot, seq)]], "applied on arrival"
            self.contributed[slot] += 1
        self.answer()

    def leave(self, slot: int) -> None:
        self.members.leave(slot)
        assert self.gate.members_changed() == []
        self.answer()

    def answer(self) -> None:
        """Answer whoever may be answered; check the bound at every answer."""
        slowest = min((self.contributed[s] for s in self.live), default=None)
        for slot in self.live:
            if not self.waiting(slot):
                continue
            seq = self.first + self.clocks[slot]
            assert slowest is not None
            allowed = self.contributed[slot] - slowest <= self.bound
            assert self.gate.may_answer(slot, seq) == allowed
            behind = [s for s in self.live if self.contributed[s] < self.contributed[slot] - self.bound]
            assert self.gate.waits_for(slot, seq) == ([] if allowed else behind)
            if allowed:
                assert self.gate.clock_gap(slot, seq) == self.contributed[slot] - slowest
                self.clocks[slot] += 1
        clocks = [self.clocks[s] for s in self.live]
        assert not clocks or max(clocks) - min(clocks) <= self.bound, "the bound was exceeded"
        assert not self.live or not all(map(self.waiting, self.live)), "all wait, and none is answered"


@given(
    workers=st.integers(1, 4),
    bound=st.integers(0, 3),
    first=st.integers(0, 50),
    actions=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 19)), max_size=80),
)
def test_ssp_never_exceeds_its_bound_and_never_stalls(
    workers: int, bound: int, first: int, actions: list[tuple[int, int]]
) -> None:
    job = Stepper(workers, bound, first)
    for slot, dice in actions:
        if dice == 0 and slot < workers:
            job.leave(slot)
        else:
            job.act(slot % workers)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_ssp_reaches_its_bound_and_stops_there(bound: int) -> None:
    job = Stepper(2, bound)
    for _ in range(bound + 5):
        job.act(0)
    assert job.clocks == [bound, 0], "the fast worker goes as far as the bound lets it"
    assert job.waiting(0)
    job.act(1)
    assert job.clocks == [bound + 1, 1], "one step of the slow one lets it go one further"


def test_ssp_goes_on_when_the_slow_worker_leaves() -> None:
    job = Stepper(3, 1)
    for slot in (0, 0, 0, 1):
        job.act(slot)
    assert job.waiting(0)
    job.leave(2)
    assert job.clocks[0] == 2
    job.leave(1)
    for _ in range(10):
        job.act(0)
    assert job.clocks[0] == 12, "nobody is left to wait for"


def test_ssp_answers_a_repeat_of_an_old_contribution() -> None:
    job = Stepper(2, 0)
    job.act(0)
    job.act(1)
    assert job.gate.may_answer(0, 0)
    assert job.gate.may_answer(0, 0), "asking changes nothing"


# ---------------------------------------------------------------- sync


def test_sync_waits_for_all_and_takes_them_in_slot_order() -> None:
    gate = SyncGate(Mode("sync"), Members(3))
    assert gate.offer(contribution(2, 0)) == []
    assert gate.offer(contribution(0, 0)) == []
    assert gate.waits_for(0, 0) == [1]
    assert not gate.may_answer(0, 0)
    assert names(gate.offer(contribution(1, 0))) == [[(0, 0), (1, 0), (2, 0)]]
    assert all(gate.may_answer(slot, 0) for slot in range(3))
    assert not gate.may_answer(0, 1)


def test_sync_goes_on_without_those_who_have_ended_or_left() -> None:
    members = Members(3)
    gate = SyncGate(Mode("sync"), members)
    gate.offer(contribution(0, 0))
    members.end_epoch(1)
    assert gate.members_changed() == []
    members.leave(2)
    assert names(gate.members_changed()) == [[(0, 0)]]


def test_sync_takes_what_a_leaver_sent_before_it_left() -> None:
    members = Members(2)
    gate = SyncGate(Mode("sync"), members)
    gate.offer(contribution(1, 0))
    members.leave(1)
    assert gate.members_changed() == [], "slot 0 still owes this round"
    assert names(gate.offer(contribution(0, 0))) == [[(0, 0), (1, 0)]]


@given(count=st.integers(1, 4), data=st.data())
def test_sync_rounds_do_not_depend_on_the_order_of_arrival(count: int, data: st.DataObject) -> None:
    """Ends of epochs included, the shard's own tests say the same of the whole state machine."""
    gate = SyncGate(Mode("sync"), Members(3))
    order = data.draw(st.permutations([slot for slot in range(3) for _ in range(count)]))
    sent, found = [0] * 3, []
    for slot in order:
        found += gate.offer(contribution(slot, sent[slot]))
        sent[slot] += 1
    assert names(found) == [[(slot, seq) for slot in range(3)] for seq in range(count)]
