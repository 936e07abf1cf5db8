"""A shard whose replicas have several ranks: each rank's chunks go their own way, passes and members are common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from unit_kit import JOB, ShardDriver, model, tensor, values_of

from downpour_common import messages as m
from downpour_common.layout import ModelSpec, Part
from downpour_common.messages import Refusal
from downpour_server.effects import Attach
from downpour_server.snapshot import Reading
from downpour_server.state import Image, Received

RANKS = 2


def spec() -> ModelSpec:
    """One tensor in two halves, and a buffer on each rank."""
    whole = tensor("w", 4)
    halves = [replace(whole, shape=(2,), cell=i, part=Part((4,), 0, ((2 * i, 2 * i + 2),))) for i in range(RANKS)]
    buffers = [replace(tensor(f"mean{i}", 1, kind="buffer"), cell=i) for i in range(RANKS)]
    return replace(model(*halves, *buffers), ranks=RANKS)


def driver(mode: str, workers: int = 4) -> ShardDriver:
    """A shard of replicas of two ranks, with first weights of 0. Chunks: halves 0 and 1, buffers 2 and 3."""
    d = ShardDriver(spec(), mode, workers)
    for chunk in d.chunks:
        column = d.layout.column_of(chunk)
        assert isinstance(d.init(chunk.index, torch.zeros(chunk.numel), slot=column), m.Ack)
    assert [d.layout.column_of(c) for c in d.chunks] == [0, 1, 0, 1]
    assert d.shard.initialised
    return d


def ones(value: float = 1.0, count: int = 2) -> torch.Tensor:
    return torch.full((count,), float(value))


def refused(answer: Any) -> Refusal:
    assert isinstance(answer, m.Refused), answer
    return Refusal(answer.code)


def version(answer: m.Message | None) -> int:
    assert isinstance(answer, m.Weights), answer
    return answer.version


def clock(answer: m.Message) -> int:
    assert isinstance(answer, m.HelloReply)
    return answer.clock


def test_a_round_is_one_contribution_of_each_rank_of_the_column() -> None:
    d = driver("sync")
    assert d.push_pull(1, 1, 0, ones(1)) is None
    assert d.push_pull(1, 3, 0, ones(3)) is not None, "column 1 waits for slots 1 and 3 alone"
    assert d.weights(1).tolist() == [2, 2]
    assert d.weights(0).tolist() == [0, 0]
    waiting = d.pushed(0, 0, 0, ones(5))
    assert d.send(waiting) is None
    [late] = d.tick(20.0)
    assert isinstance(late, m.Refused)
    assert "worker/2" in late.reason
    assert "worker/1" not in late.reason
    assert version(d.push_pull(0, 2, 0, ones(7))) == 1
    assert d.weights(0).tolist() == [6, 6]


def test_in_async_every_rank_is_answered_at_once() -> None:
    d = driver("async")
    assert version(d.push_pull(0, 0, 0, ones())) == 1
    assert version(d.push_pull(0, 2, 0, ones())) == 2
    assert version(d.push_pull(1, 3, 0, ones())) == 1


def test_in_ssp_the_bound_is_between_the_ranks_of_a_column() -> None:
    d = driver("ssp:1")
    assert d.push_pull(0, 0, 0, ones()) is not None
    ahead = d.pushed(0, 0, 1, ones())
    assert d.send(ahead) is None, "slot 2 is two clocks behind"
    assert d.push_pull(1, 3, 0, ones()) is not None
    assert ahead.request not in d.answers, "a rank of the other column is not who it waits for"
    assert d.push_pull(0, 2, 0, ones()) is not None
    assert version(d.answers[ahead.request]) == 3


def test_who_joins_in_ssp_begins_at_the_clock_of_its_column() -> None:
    d = driver("ssp:9", workers=2)
    for seq in range(3):
        d.push_pull(0, 0, seq, ones())
        d.push_pull(1, 1, seq, ones())
    d.push_pull(1, 1, 3, ones())
    d.members(1, (0, 0), (1, 0), (2, 0), (3, 0))
    assert [clock(d.hello(slot)) for slot in (2, 3)] == [3, 4]


@pytest.mark.parametrize("mode", ["async", "ssp:1", "sync"])
def test_what_is_another_ranks_is_refused_and_may_be_read(mode: str) -> None:
    d = driver(mode)
    assert refused(d.push_pull(1, 0, 0, ones())) == Refusal.MALFORMED
    assert refused(d.push(3, 2, 0, ones(1, 1))) == Refusal.MALFORMED
    assert refused(d.init(0, ones(), slot=1)) == Refusal.MALFORMED
    stage = m.Stage(d.number(), JOB, 0, 0, 1, bytes(8))
    staged = d.answer(stage)
    assert isinstance(staged, m.Staged)
    push = m.PushPullStaged(d.number(), JOB, 5, 0, 0, 0, 0, 1, 1, (), b"", stage.request, staged.digest)
    assert refused(d.send(push)) == Refusal.MALFORMED
    assert d.weights(1).tolist() == [0, 0]
    for slot in range(4):
        for chunk in range(4):
            assert version(d.pull(chunk, slot)) == 0


def test_shared_memory_holds_the_column_and_nothing_lodges_there() -> None:
    d = driver("async", workers=2)
    layout = d.shard.shared_layout(1)
    memory = memoryview(bytearray(layout.nbytes))
    assert layout.nbytes == d.shard.shared_layout(0).nbytes
    offer = m.AttachMemory(d.number(), JOB, 1, 0, 1, 1, bytes(16), True)
    [effect] = d.shard.handle(b"peer of %d" % offer.request, offer, 0.0)
    assert isinstance(effect, Attach)
    d.carry_out(d.shard.attached(effect, memory))
    gradient = torch.frombuffer(memory[layout.gradient(d.chunks[1])], dtype=torch.float32)
    weights = torch.frombuffer(memory[layout.weights(d.chunks[1])], dtype=torch.float32)
    gradient.fill_(3)
    answer = d.send(m.PushPullShared(d.number(), JOB, 5, 1, 0, 0, 0, 1, 1, (), b""))
    assert isinstance(answer, m.WeightsShared)
    assert weights.tolist() == [3, 3]
    weights.fill_(100)  # the worker's own: the shard's are not there
    assert values_of(d.pull(1, 1)) == [3, 3]
    assert weights.tolist() == [100, 100], "a pull is sent"
    foreign = m.PushPullShared(d.number(), JOB, 5, 1, 0, 0, 0, 0, 1, (), b"")
    assert refused(d.send(foreign)) == Refusal.NOT_SHARED
    assert d.shard.payload_of(foreign) is None


def test_buffers_are_averaged_over_a_column() -> None:
    d = driver("async")
    d.push(2, 0, 0, ones(1, 1))
    d.push(2, 2, 0, ones(2, 1))
    d.push(3, 1, 0, ones(5, 1))
    assert d.weights(2).tolist() == [1.5]
    assert d.weights(3).tolist() == [5]


def test_a_pass_is_over_when_all_ranks_have_ended_it() -> None:
    d = driver("sync")
    for slot in range(4):
        d.push_pull(slot % 2, slot, 0, ones())
    ends = [d.end_epoch(slot) for slot in range(3)]
    assert not any(request in d.answers for request in ends)
    ends.append(d.end_epoch(3))
    assert [d.answers[request].version for request in ends] == [1] * 4  # type: ignore[attr-defined]


def test_a_torn_last_round_leaves_the_columns_at_one_number() -> None:
    """A replica is lost that has contributed to one column only, after the other one has ended the pass."""
    d = driver("sync")

    def end(slot: int) -> int:
        request = m.EndEpoch(d.number(), JOB, slot, 0, 0, 0)
        d.send(request)
        return request.request

    ends = [end(0), end(1)]
    d.push_pull(0, 2, 0, ones())  # and slot 3 did not
    assert [d.shard.chunks[i].version for i in (0, 1)] == [1, 0]
    d.members(1, (0, 0), (1, 0))
    assert [d.answers[request].version for request in ends] == [1, 1]  # type: ignore[attr-defined]
    for slot in (0, 1):
        assert version(d.push_pull(slot, slot, 1, ones())) == 2
    assert [d.shard.chunks[i].version for i in (0, 1)] == [2, 2]


def test_who_takes_over_is_told_of_its_own_column() -> None:
    d = ShardDriver(spec(), "sync", 4)
    for chunk in d.chunks:
        d.init(chunk.index, torch.zeros(chunk.numel), slot=d.layout.column_of(chunk))
    for slot in range(4):
        assert clock(d.hello(slot)) == 0
    for seq in range(3):
        for slot in (0, 2):
            d.push_pull(0, slot, seq, ones())
    for slot in (1, 3):
        d.push_pull(1, slot, 0, ones())
    d.members(1, (0, 1), (1, 1), (2, 0), (3, 0))
    assert [clock(d.hello(slot, worker_epoch=1)) for slot in (0, 1)] == [3, 1]


def test_first_weights_are_awaited_from_the_lowest_slot_of_the_column() -> None:
    d = ShardDriver(spec(), "sync", 4)
    d.members(1, (2, 0), (3, 0))
    for chunk, slot in ((0, 3), (1, 2)):
        assert d.pull(chunk, slot) is None
    reasons = [answer.reason for answer in d.tick(20.0) if isinstance(answer, m.Refused)]
    assert [r for r in reasons if "initial weights of worker/2" in r]
    assert [r for r in reasons if "initial weights of worker/3" in r]


def test_a_backup_goes_on_with_all_columns() -> None:
    d = driver("sync")
    d.push_pull(1, 1, 0, ones(1))
    d.push_pull(1, 3, 0, ones(3))
    d.push_pull(0, 2, 0, ones(4))
    received = Received()
    for part, _ in Image(d.shard, Reading()).parts():
        received.take(part)
    follower = ShardDriver(spec(), "sync", 4)
    received.load(follower.shard)
    assert version(follower.push_pull(0, 0, 0, ones(2))) == 1
    assert follower.weights(0).tolist() == [3, 3]
    assert follower.weights(1).tolist() == [2, 2]


def test_what_a_lost_shard_had_is_counted_for_the_ranks_whose_it_was() -> None:
    d = ShardDriver(spec(), "async", 4)
    for stored in d.shard.chunks.values():
        stored.restore(torch.zeros(stored.chunk.numel), {}, 0)
    d.shard.recovered(0)
    for slot, done in ((0, 4), (1, 2)):
        d.answer(m.Hello(d.number(), JOB, slot, 0, d.layout.digest, done, 0))
    assert d.shard.stats.lost_pushes == {0: 4, 1: 2}
