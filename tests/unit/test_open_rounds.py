"""Rounds that workers join and leave at any time, and rounds that do without the slowest."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour_common.modes import parse_mode
from downpour_server.contribution import Contribution
from downpour_server.members import Members
from downpour_server.policy import Gate, gate_for
from downpour_server.policy.asynchronous import AsyncGate
from downpour_server.policy.exchanges import ExchangeGate
from downpour_server.policy.rounds import RoundGate
from downpour_server.policy.stale import StaleGate
from downpour_server.policy.synchronous import SyncGate


@dataclass
class Chunk:
    """A chunk whose updates are only counted; ``late``: (slot, seq) of what was dropped."""

    version: int = 0
    late: list[tuple[int, int]] = field(default_factory=list)
    applied: list[list[tuple[int, int]]] = field(default_factory=list)

    def gate(self, mode: str, members: Members, group: int = 0) -> Gate:
        """Its gate in such a job."""
        return gate_for(parse_mode(mode), group, members, self, self.too_late)

    def rounds(self, members: Members, backup: int = 0) -> RoundGate:
        """Rounds that do without so many."""
        return RoundGate(parse_mode(f"sync,backup={backup}"), members, self, self.too_late)

    def too_late(self, contribution: Contribution) -> None:
        """Note what was dropped."""
        self.late.append((contribution.slot, contribution.seq))

    def take(self, rounds: list[list[Contribution]]) -> list[list[tuple[int, int]]]:
        """Count these updates; returns them as (slot, seq)."""
        named = [[(c.slot, c.seq) for c in round_] for round_ in rounds]
        self.version += len(rounds)
        self.applied += named
        return named


def contribution(slot: int, seq: int, base: int = 0) -> Contribution:
    """A contribution made from the weights of version ``base``."""
    return Contribution(slot, seq, 1, base, b"", torch.zeros(1))


@pytest.mark.parametrize(
    ("mode", "group", "kind"),
    [
        ("async", 0, AsyncGate),
        ("ssp:2", 0, StaleGate),
        ("sync", 0, SyncGate),
        ("sync", -1, SyncGate),
        ("sync,backup=1", 0, RoundGate),
        ("sync,backup=1", -1, AsyncGate),
        ("average:5", 0, ExchangeGate),
        ("average:5", -1, AsyncGate),
        ("diloco:5,fragments=2", 3, ExchangeGate),
        ("easgd:5", 0, AsyncGate),
        ("sync;1=async", 0, ExchangeGate),
        ("sync,backup=1;1=async", 0, RoundGate),
        ("sync;1=async", 1, AsyncGate),
        ("sync;1=async", -1, AsyncGate),
        ("async;1=sync;2=ssp:1", 1, ExchangeGate),
        ("async;1=sync;2=ssp:1", 2, StaleGate),
        ("async;1=sync;2=ssp:1", 7, AsyncGate),
    ],
)
def test_each_parameter_group_has_the_gate_of_its_mode(mode: str, group: int, kind: type) -> None:
    assert type(Chunk().gate(mode, Members(2), group)) is kind


def test_a_round_is_one_contribution_of_each_in_slot_order() -> None:
    members, chunk = Members(3), Chunk()
    gate = chunk.rounds(members)
    assert chunk.take(gate.offer(contribution(2, 0))) == []
    assert chunk.take(gate.offer(contribution(0, 0))) == []
    assert gate.waits_for(0, 0) == [1]
    assert not gate.may_answer(0, 0)
    assert chunk.take(gate.offer(contribution(1, 0))) == [[(0, 0), (1, 0), (2, 0)]]
    assert all(gate.may_answer(slot, 0) for slot in range(3))
    assert not gate.may_answer(0, 1)


def test_a_round_goes_on_without_one_that_is_gone_and_keeps_what_it_gave() -> None:
    members, chunk = Members(3), Chunk()
    gate = chunk.rounds(members)
    for slot in (0, 2):
        gate.offer(contribution(slot, 0))
    change = members.replace(1, {0: 0, 2: 0})
    assert change is not None
    assert change.over == {1}
    assert chunk.take(gate.members_changed()) == [[(0, 0), (2, 0)]]
    gate.offer(contribution(0, 1))
    members.replace(2, {2: 0})
    assert chunk.take(gate.members_changed()) == [], "worker 2 is still to come"
    assert chunk.take(gate.offer(contribution(2, 1))) == [[(0, 1), (2, 1)]]


def test_who_joins_is_awaited_from_the_open_round_on() -> None:
    members, chunk = Members(2), Chunk()
    gate = chunk.rounds(members)
    gate.offer(contribution(0, 4))
    members.replace(1, {0: 0, 1: 0, 2: 5})
    gate.joined({2})
    assert chunk.take(gate.offer(contribution(1, 4))) == []
    assert gate.waits_for(0, 4) == [2]
    assert chunk.take(gate.offer(contribution(2, 0))) == [[(0, 4), (1, 4), (2, 0)]]


def test_what_a_worker_left_counts_though_another_has_its_slot_and_its_numbers_do_not() -> None:
    members, chunk = Members(2), Chunk()
    members.objection(1, 0)
    gate = chunk.rounds(members)
    gate.offer(contribution(1, 7))
    change = members.replace(1, {0: 0, 1: 3})
    assert change is not None
    assert change.joined == {1}
    gate.joined(change.joined)
    assert chunk.take(gate.members_changed()) == []
    assert gate.waiting() == []
    gate.offer(contribution(1, 0))
    assert not gate.may_answer(1, 0)
    assert chunk.take(gate.offer(contribution(0, 7))) == [[(0, 7), (1, 0), (1, 7)]]
    assert gate.may_answer(1, 0)
    assert not gate.may_answer(1, 1), "7 was another's number"


def test_nobody_waits_for_those_who_have_ended_their_pass() -> None:
    members, chunk = Members(2), Chunk()
    gate = chunk.rounds(members)
    gate.offer(contribution(0, 0))
    members.end_epoch(1)
    assert chunk.take(gate.members_changed()) == [[(0, 0)]]
    members.end_epoch(0)
    assert chunk.take(gate.members_changed()) == []
    assert members.turn_over()
    assert chunk.take(gate.offer(contribution(0, 1))) == []


def test_chunks_whose_numbers_differ_do_not_mind() -> None:
    members = Members(2)
    one, other = Chunk(), Chunk()
    first, second = one.rounds(members), other.rounds(members)
    for seq in range(3):
        first.offer(contribution(0, seq))
        assert one.take(first.offer(contribution(1, seq))) == [[(0, seq), (1, seq)]]
    second.offer(contribution(1, 0))
    assert other.take(second.offer(contribution(0, 0))) == [[(0, 0), (1, 0)]]


def test_contributions_in_borrowed_memory_are_copied_when_it_may_change() -> None:
    gate = Chunk().rounds(Members(2))
    offered = contribution(0, 0)
    memory = offered.gradient
    gate.offer(offered)
    gate.own(1)
    assert offered.gradient is memory
    gate.own(0)
    assert offered.gradient is not memory


def test_a_shard_that_comes_back_answers_what_it_has_already() -> None:
    gate = Chunk().rounds(Members(2))
    gate.reached(0, 5)
    assert gate.may_answer(0, 4)
    assert not gate.may_answer(0, 5)
    gate.reached(0, 2)
    assert gate.may_answer(0, 4)


# ---------------------------------------------------------------- backups


def test_the_first_make_the_round_and_the_last_is_late_and_answered_at_once() -> None:
    members, chunk = Members(3), Chunk()
    gate = chunk.rounds(members, 1)
    assert chunk.take(gate.offer(contribution(2, 0))) == []
    assert chunk.take(gate.offer(contribution(0, 0))) == [[(0, 0), (2, 0)]]
    assert chunk.take(gate.offer(contribution(1, 0))) == []
    assert chunk.late == [(1, 0)]
    assert gate.may_answer(1, 0), "with the newest weights"
    gate.offer(contribution(1, 1, 1))
    assert chunk.take(gate.offer(contribution(2, 1, 1))) == [[(1, 1), (2, 1)]]
    assert chunk.late == [(1, 0)]


def test_what_becomes_late_while_it_waits_is_answered_too() -> None:
    """A worker that is a step ahead of its answers."""
    members, chunk = Members(2), Chunk()
    gate = chunk.rounds(members, 1)
    assert len(chunk.take(gate.offer(contribution(0, 0)))) == 1
    assert len(chunk.take(gate.offer(contribution(1, 0, 1)))) == 1
    assert chunk.take(gate.offer(contribution(0, 1, 0))) == []
    assert chunk.late == [(0, 1)]
    assert gate.may_answer(0, 1)


def test_there_is_always_one_in_a_round() -> None:
    members, chunk = Members(3), Chunk()
    gate = chunk.rounds(members, 2)
    members.leave(0)
    members.leave(1)
    assert chunk.take(gate.members_changed()) == []
    assert chunk.take(gate.offer(contribution(2, 0))) == [[(2, 0)]]


# ---------------------------------------------------------------- whatever happens


@dataclass
class Worker:
    """One that pushes, waits for its answer, and pushes again."""

    slot: int
    epoch: int
    seq: int = 0
    base: int = 0
    waits: bool = False
    ended: bool = False


@given(st.integers(0, 2), st.integers(0, 10**9))
def test_no_round_hangs_and_every_contribution_counts_once_or_is_late(backup: int, seed: int) -> None:
    rng = random.Random(seed)
    members, chunk = Members(4), Chunk()
    gate = chunk.rounds(members, backup)
    workers = {slot: Worker(slot, 0) for slot in range(4)}
    epochs, pushed = 0, Counter[tuple[int, int]]()

    def settle() -> None:
        for worker in workers.values():
            if worker.waits and gate.may_answer(worker.slot, worker.seq):
                worker.waits, worker.base, worker.seq = False, chunk.version, worker.seq + 1

    def push(worker: Worker) -> None:
        worker.waits = True
        pushed[worker.slot, worker.epoch * 1000 + worker.seq] += 1
        chunk.take(gate.offer(contribution(worker.slot, worker.seq, worker.base)))

    def change() -> None:
        nonlocal epochs
        epochs += 1
        outcome = members.replace(epochs, {w.slot: w.epoch for w in workers.values()})
        assert outcome is not None
        gate.joined(outcome.joined)
        turn()

    def turn() -> None:
        chunk.take(gate.members_changed())
        if members.turn_over():
            for other in workers.values():
                other.ended = False

    for _ in range(rng.randrange(60)):
        worker = rng.choice([*workers.values()])
        act = rng.random()
        if act < 0.8:
            if not worker.waits and not worker.ended:
                push(worker)
        elif act < 0.86 and len(workers) > 1:
            del workers[worker.slot]
            change()
        elif act < 0.93:
            slot = rng.randrange(6)
            workers[slot] = Worker(slot, epochs + 1, 0, chunk.version)
            change()
        elif not worker.ended and not worker.waits:
            worker.ended = True
            members.end_epoch(worker.slot)
            turn()
        settle()
    version = chunk.version
    for _ in range(2):  # what is late the first time is not the second
        for worker in [w for w in workers.values() if not w.waits and not w.ended]:
            push(worker)
        settle()
    assert chunk.version > version, "all who can have pushed"
    for worker in workers.values():
        if not worker.ended:
            members.end_epoch(worker.slot)
    chunk.take(gate.members_changed())
    settle()
    assert not any(w.waits for w in workers.values()), "nobody waits when nobody is awaited"
    assert gate.waiting() == []
    assert sum(map(len, chunk.applied)) + len(chunk.late) == sum(pushed.values())
    assert backup or not chunk.late
    for round_ in chunk.applied:
        assert round_ == sorted(round_, key=lambda pair: pair[0])
