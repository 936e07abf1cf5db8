"""The gate of ``average`` and ``diloco``, and the fragments of a model."""

from __future__ import annotations

from typing import Any, cast

import torch
from unit_kit import JOB, ShardDriver, model, tensor

from downpour.joining import join
from downpour.local.fragments import fragments_of
from downpour_common import messages as m
from downpour_common.layout import Chunk
from downpour_common.modes import parse_mode
from downpour_server.contribution import Contribution
from downpour_server.policy.exchanges import ExchangeGate

Rounds = list[list[Contribution]]


class Awaiting:
    def __init__(self, *slots: int, first_seq: int = 0) -> None:
        self.slots = list(slots)
        self.first_seq = first_seq

    def awaited(self) -> list[int]:
        return self.slots


class Versionless:
    version = 0


def gate_of(members: Awaiting) -> ExchangeGate:
    return ExchangeGate(parse_mode("average:5"), members, Versionless(), lambda _: None)


def contribution(slot: int, seq: int) -> Contribution:
    return Contribution(slot, seq, 1, 0, b"", torch.zeros(1))


def named(rounds: Rounds) -> list[list[tuple[int, int]]]:
    return [[(c.slot, c.seq) for c in round_] for round_ in rounds]


def test_a_round_waits_for_all_of_its_number() -> None:
    gate = gate_of(Awaiting(0, 1, first_seq=7))
    assert gate.offer(contribution(1, 7)) == []
    assert not gate.may_answer(1, 7)
    assert gate.waits_for(1, 7) == [0]
    assert named(gate.offer(contribution(0, 7))) == [[(0, 7), (1, 7)]]
    assert gate.may_answer(0, 7)
    assert gate.may_answer(1, 7)
    assert gate.waiting() == []


def test_who_joins_is_awaited_from_the_number_that_it_names() -> None:
    members = Awaiting(0, 1)
    gate = gate_of(members)
    gate.offer(contribution(0, 0))
    members.slots = [0, 1, 2]
    gate.joined([2])
    assert gate.clock_of(2) == 0
    assert named(gate.offer(contribution(1, 0))) == [[(0, 0), (1, 0)]]
    assert gate.clock_of(2) == 1
    gate.reached(2, 2)  # another shard was at 2
    gate.offer(contribution(0, 1))
    assert named(gate.offer(contribution(1, 1))) == [[(0, 1), (1, 1)]]
    gate.offer(contribution(0, 2))
    assert gate.offer(contribution(1, 2)) == []
    assert named(gate.offer(contribution(2, 2))) == [[(0, 2), (1, 2), (2, 2)]]


def test_what_is_late_by_one_is_caught_up_with() -> None:
    members = Awaiting(0, 1)
    gate = gate_of(members)
    gate.joined([1])
    for seq in range(3):
        assert named(gate.offer(contribution(0, seq))) == [[(0, seq)]]
    gate.reached(1, 2)
    late = contribution(1, 2)
    late.gradient = gradient = torch.ones(1)
    assert gate.offer(late) == []
    assert gate.may_answer(1, 2)
    gradient.zero_()  # its worker goes on
    assert gate.waiting() == [(1, 2)]
    assert gate.offer(contribution(0, 3)) == []
    [round_] = gate.offer(contribution(1, 3))
    assert named([round_]) == [[(0, 3), (1, 2), (1, 3)]]
    assert round_[1].gradient.item() == 1


def test_who_lags_behind_by_more_is_not_waited_for() -> None:
    gate = gate_of(Awaiting(0, 1))
    gate.joined([1])
    for seq in range(5):
        gate.offer(contribution(0, seq))
    assert gate.offer(contribution(1, 2)) == []
    assert gate.may_answer(1, 2)
    assert named(gate.offer(contribution(0, 5))) == [[(0, 5), (1, 2)]]
    assert gate.waits_for(0, 6) == [0]
    gate.reached(1, 6)
    assert gate.waits_for(0, 6) == [0, 1]
    assert gate.offer(contribution(0, 6)) == []


def test_who_is_gone_is_not_waited_for_and_what_it_sent_counts() -> None:
    members = Awaiting(0, 1, 2)
    gate = gate_of(members)
    gate.offer(contribution(2, 0))
    gate.offer(contribution(0, 0))
    members.slots = [0, 2]
    gate.joined([2])  # another process
    assert named(gate.members_changed()) == [[(0, 0), (2, 0)]]
    assert not gate.may_answer(2, 0)


def test_the_last_contributions_are_one_round() -> None:
    members = Awaiting(0, 1)
    gate = gate_of(members)
    gate.offer(contribution(0, 0))
    members.slots = []
    assert named(gate.members_changed()) == [[(0, 0)]]
    members.slots = [0]
    gate.joined([1])
    gate.offer(contribution(0, 1))
    gate.offer(contribution(1, 0))
    members.slots = []
    assert named(gate.members_changed()) == [[(1, 0)]]
    assert gate.members_changed() == []


def test_a_shard_that_came_back_learns_where_the_others_are() -> None:
    gate = gate_of(Awaiting(0, 1, 2))
    gate.reached(0, 9)
    assert gate.offer(contribution(0, 9)) == []
    gate.reached(2, 9)
    gate.reached(1, 10)  # it has had its answer to 9 of the process before
    assert gate.clock_of(1) == 9
    assert named(gate.offer(contribution(2, 9))) == [[(0, 9), (2, 9)]]


def test_fragments_are_balanced_and_the_same_for_all() -> None:
    sizes = [100, 100, 30, 100, 70, 100, 100]
    chunks = [Chunk(i, 0, 0, "trainable", "float32", 0, 0, size) for i, size in enumerate(sizes)]
    found = fragments_of(chunks, 3, 10, 4)
    assert sorted(c.index for f in found for c in f.chunks) == list(range(7))
    assert [sum(c.numel for c in f.chunks) for f in found] == [200, 200, 200]
    assert [f.offset for f in found] == [3, 6, 0]
    assert [f.offset for f in fragments_of(chunks[:1], 3, 10, 4)] == [0]
    assert fragments_of([], 3, 10, 0) == []


class Joining:
    """The client of worker 1, before whose first word worker 0 goes on for three rounds."""

    def __init__(self, d: ShardDriver) -> None:
        self.d = d
        self.next = 0
        self.lead = 3

    def take_part(self) -> None:
        for seq in range(self.lead):
            assert self.d.push_pull(0, 0, seq, torch.ones(4)) is not None
        self.lead = 0
        d = self.d
        d.answer(m.Hello(d.number(), JOB, 1, 1, d.layout.digest, self.next, 0))

    def hello_again(self) -> list[m.Message]:
        return [self.d.hello(1, worker_epoch=1)]

    def begin_at(self, seq: int) -> None:
        self.next = seq


def test_who_joins_begins_where_the_others_stand_by_then() -> None:
    d = ShardDriver(model(tensor("w", 4)), "average:1", 1)
    d.init_all()
    d.hello(0)
    d.members(1, (0, 0), (1, 1))
    client = Joining(d)
    column = d.layout.of_column(0)
    assert join(cast(Any, client), column, lambda number: number, 0) == client.next == 3
    assert d.push_pull(0, 0, 3, torch.ones(4)) is None, "it is awaited"
    assert d.push_pull(0, 1, 3, torch.ones(4), worker_epoch=1) is not None
    assert join(cast(Any, client), column, lambda number: number, 4) == 4, "nobody has gone on meanwhile"
