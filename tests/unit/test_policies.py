"""When contributions are applied and fetches answered, whatever the order in which they arrive."""

from __future__ import annotations

import random
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
        self.members = Members(self.workers, self.first)
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


@dataclass
class Elastic:
    """A job of several chunks on several shards, where workers join: what is said to a chunk arrives when the test
    lets it, in order per worker; the news of a joiner arrives at each chunk at a moment of its own."""

    bound: int
    chunks: int
    workers: int
    first: int
    window: int
    """chunks of a step that a worker sends before it needs answers; of its first step it sends all"""

    def __post_init__(self) -> None:
        self.members = [Members(self.workers, self.first) for _ in range(self.chunks)]
        self.gates = [StaleGate(Mode("ssp", self.bound), members) for members in self.members]
        self.versions = [0] * self.chunks
        self.slots = list(range(self.workers))
        self.seq = dict.fromkeys(self.slots, self.first)
        self.first_seq = dict(self.seq)
        self.sent = dict.fromkeys(self.slots, 0)
        self.open: dict[int, set[int]] = {slot: set() for slot in self.slots}
        self.on_the_way: list[tuple[int, int]] = []
        self.waiting: list[list[tuple[int, int]]] = [[] for _ in range(self.chunks)]
        self.news: list[tuple[int, int]] = []
        for slot in self.slots:
            self.go_on(slot)

    def clock(self, slot: int) -> int:
        """Completed steps, those before it joined included."""
        return self.seq[slot] - self.first

    def go_on(self, slot: int) -> None:
        """Send what there is credit for; the next step begins when all of one is answered."""
        if self.sent[slot] == self.chunks and not self.open[slot]:
            self.sent[slot] = 0
            self.seq[slot] += 1
        window = self.window if self.seq[slot] > self.first_seq[slot] else self.chunks
        while self.sent[slot] < self.chunks and len(self.open[slot]) < window:
            self.open[slot].add(self.sent[slot])
            self.on_the_way.append((slot, self.sent[slot]))
            self.sent[slot] += 1

    def deliver(self, pick: int) -> None:
        """One of the messages that are first in their line arrives, a contribution or the news of a joiner."""
        heads = [m for i, m in enumerate(self.on_the_way) if m[0] not in [s for s, _ in self.on_the_way[:i]]]
        choices = [*[(True, m) for m in heads], *[(False, n) for n in self.news]]
        if not choices:
            return
        contributed, (slot, chunk) = choices[pick % len(choices)]
        if contributed:
            self.on_the_way.remove((slot, chunk))
            self.gates[chunk].offer(contribution(slot, self.seq[slot]))
            self.waiting[chunk].append((slot, self.seq[slot]))
        else:
            self.news.remove((slot, chunk))
            before = self.members[chunk].awaited()
            self.versions[chunk] += 1
            self.members[chunk].replace(self.versions[chunk], dict.fromkeys([*before, slot], 0))
            self.gates[chunk].joined([slot])
            if slot not in [s for s, _ in self.news]:
                self.welcome(slot)
        self.answer(chunk)

    def answer(self, chunk: int) -> None:
        ready = [(s, q) for s, q in self.waiting[chunk] if self.gates[chunk].may_answer(s, q)]
        for slot, seq in ready:
            self.waiting[chunk].remove((slot, seq))
            self.open[slot].remove(chunk)
            self.go_on(slot)
        clocks = [self.clock(slot) for slot in self.slots]
        assert max(clocks) - min(clocks) <= self.bound + 1, "one more than the bound: the answers may be on their way"

    def join(self) -> None:
        """A worker is to join, once all have heard of the one before."""
        if not self.news:
            self.news = [(len(self.slots), chunk) for chunk in range(self.chunks)]

    def welcome(self, slot: int) -> None:
        self.slots.append(slot)
        self.seq[slot] = self.first_seq[slot] = self.first + max(gate.clock_of(slot) for gate in self.gates)
        self.sent[slot], self.open[slot] = 0, set()
        self.go_on(slot)


@given(
    bound=st.integers(0, 2),
    chunks=st.integers(1, 3),
    workers=st.integers(1, 3),
    first=st.integers(0, 9),
    window=st.integers(1, 3),
    actions=st.lists(st.integers(0, 30), max_size=120),
)
def test_ssp_workers_that_join_neither_break_the_bound_nor_stall_anybody(
    bound: int, chunks: int, workers: int, first: int, window: int, actions: list[int]
) -> None:
    job = Elastic(bound, chunks, workers, first, window)
    for action in actions:
        if action == 30 and len(job.slots) < 5:
            job.join()
        else:
            job.deliver(action)
    reached = {slot: job.clock(slot) for slot in job.slots}
    dice = random.Random(1)
    for _ in range(100 * chunks * (len(job.slots) + 1)):
        job.deliver(dice.randrange(60))
    assert all(job.clock(slot) > clock for slot, clock in reached.items()), "somebody waits for ever"


def test_ssp_nobody_waits_for_a_joiner_to_catch_up() -> None:
    members = Members(2)
    gate = StaleGate(Mode("ssp", 1), members)
    for seq in range(40):
        gate.offer(contribution(0, seq))
        gate.offer(contribution(1, seq))
    members.replace(1, {0: 0, 1: 0, 2: 0})
    gate.joined({2})
    gate.offer(contribution(0, 40))
    assert gate.may_answer(0, 40)
    gate.offer(contribution(0, 41))
    assert gate.waits_for(0, 41) == [1, 2]
    gate.offer(contribution(1, 40))
    gate.offer(contribution(2, 40))
    assert gate.may_answer(0, 41)
    assert gate.may_answer(2, 40)


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
