"""Another process goes on in the place of a worker of a synchronous job: as if nothing had happened, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from unit_kit import ADD, JOB, FakeSent, ShardDriver, model, payload, refusal, tensor, values_of

from downpour_common import messages as m
from downpour_common.layout import plan
from downpour_common.messages import Refusal
from downpour_common.modes import parse_mode
from downpour_server.effects import Attach, SendWeights
from downpour_server.shard import Identity, Shard

ONE = model(tensor("w", 4))
ADAM = {"lr": 0.05, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}


class Driver(ShardDriver):
    """A shard that keeps what a replacement needs; weights that are sent are copied at once."""

    def __init__(self, spec: Any = ONE, workers: int = 2, chunk_bytes: int = 1 << 20, **others: Any) -> None:
        super().__init__(spec, "sync", workers, chunk_bytes=chunk_bytes)
        identity = Identity(JOB, 0, 5)
        options = {"keep_previous": True, **others}
        self.shard = Shard(identity, self.layout, parse_mode("sync"), workers, 10.0, **options)

    def carry_out(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, SendWeights) and effect.previous:
                stored = effect.stored
                view = stored.payload(previous=True)
                if self.sent is not None:
                    self.views[effect.request] = view
                    stored.being_read(self.sent, previous=True)
                weights = m.Weights(effect.request, stored.chunk.index, stored.previous_version, bytes(view))
                self._answered(effect.peer, weights)
            else:
                super().carry_out([effect])

    def greet(self, slot: int, epoch: int = 0, **others: Any) -> m.HelloReply:
        reply = self.answer(m.Hello(self.number(), JOB, slot, epoch, self.layout.digest, **others))
        assert isinstance(reply, m.HelloReply), reply
        return reply

    def end(self, slot: int, loader: int, epoch: int, worker_epoch: int = 0) -> m.Message | None:
        return self.send(m.EndEpoch(self.number(), JOB, slot, worker_epoch, loader, epoch))


def ones(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def driver(**others: Any) -> Driver:
    """Two workers, one chunk of four zeros, and one round that is done."""
    made = Driver(**others)
    made.init_all()
    for slot in (0, 1):
        made.greet(slot)
        made.push(0, slot, 0, ones(1, 0, 0, 0), position=(0, 8))
    return made


# ---------------------------------------------------------------- what the new process is told


def test_a_process_that_takes_over_learns_where_its_predecessor_was() -> None:
    d = driver()
    d.push(0, 1, 1, ones(0, 2, 0, 0), position=(0, 16))
    d.members(1, (0, 0), (1, 1))
    reply = d.greet(1, 1)
    assert (reply.clock, reply.position, reply.ended) == (2, (0, 16), ())
    assert refusal(d.hello(slot=1, worker_epoch=0))[0] == Refusal.STALE_EPOCH


def test_the_clock_is_that_of_the_chunk_that_has_least_and_the_position_is_before_it() -> None:
    d = Driver(model(tensor("w", 8)), chunk_bytes=16)
    d.init_all()
    d.push(0, 1, 0, ones(1, 1, 1, 1), position=(0, 8))
    d.push(1, 1, 0, ones(1, 1, 1, 1), position=(0, 8))
    d.push(0, 1, 1, ones(1, 1, 1, 1), position=(1, 0))
    d.members(1, (0, 0), (1, 1))
    reply = d.greet(1, 1)
    assert (reply.clock, reply.position) == (1, (0, 8))


def test_one_whose_predecessor_had_not_spoken_begins_where_the_round_is() -> None:
    d = Driver(workers=2)
    d.shard.start_from(70)
    d.init_all()
    d.members(1, (0, 0), (1, 1))
    reply = d.greet(1, 1)
    assert (reply.clock, reply.position, reply.buffers, reply.ended) == (70, (), 70, ())


def test_the_next_contribution_to_buffers_is_counted_apart() -> None:
    d = Driver(model(tensor("w", 4), tensor("mean", 2, kind="buffer")))
    d.init_all()
    d.push(1, 1, 0, ones(3, 3))
    d.push(1, 1, 1, ones(3, 3))
    d.members(1, (0, 0), (1, 1))
    reply = d.greet(1, 1)
    assert (reply.clock, reply.buffers) == (0, 2)
    assert isinstance(d.push(1, 1, 1, ones(9, 9), worker_epoch=1), m.Ack)
    assert d.shard.stats.repeats == 1


def test_one_that_comes_after_a_worker_that_has_left_begins_anew() -> None:
    d = driver()
    d.leave(1)
    d.members(1, (0, 0), (1, 1))
    reply = d.greet(1, 1)
    assert (reply.clock, reply.position) == (1, ()), "the round that is open"


# ---------------------------------------------------------------- what stays, and what goes


def test_what_the_predecessor_sent_counts_and_is_not_taken_twice() -> None:
    d = driver()
    d.push(0, 1, 1, ones(0, 2, 0, 0))
    d.members(1, (0, 0), (1, 1))
    waiting = d.pushed(0, 1, 1, ones(0, 2, 0, 0), worker_epoch=1)
    assert d.send(waiting) is None, "its round is open"
    assert values_of(d.push_pull(0, 0, 1, ones(0, 0, 2, 0))) == [1, 1, 1, 0]
    assert values_of(d.answers[waiting.request]) == [1, 1, 1, 0]
    assert values_of(d.push_pull(0, 1, 1, ones(0, 2, 0, 0), worker_epoch=1)) == [1, 1, 1, 0], "a repeat of it"


def test_requests_of_the_predecessor_are_refused_and_what_it_staged_is_dropped() -> None:
    d = driver()
    waiting = d.pushed(0, 1, 1, ones(0, 2, 0, 0))
    assert d.send(waiting) is None
    stage = m.Stage(d.number(), JOB, 1, 0, 0, payload(ones(1, 1, 1, 1)))
    staged = d.answer(stage)
    assert isinstance(staged, m.Staged)
    d.members(1, (0, 0), (1, 1))
    assert refusal(d.answers[waiting.request])[0] == Refusal.STALE_EPOCH
    fields = (JOB, 5, 1, 1, 2, 1, 0, 1, (), b"")
    push = m.PushPullStaged(d.number(), *fields, stage.request, staged.digest)
    assert refusal(d.send(push))[0] == Refusal.NOT_STAGED


def test_a_push_from_the_memory_of_the_dead_is_copied_before_it_is_told() -> None:
    d = driver()
    memory = memoryview(bytearray(d.shard.shared_layout(0).nbytes))
    offer = m.AttachMemory(d.number(), JOB, 1, 0, 1, 1, bytes(16), False)
    [effect] = d.shard.handle(b"peer of %d" % offer.request, offer, 0.0)
    assert isinstance(effect, Attach)
    d.carry_out(d.shard.attached(effect, memory))
    gradient = torch.frombuffer(memory[d.shard.shared_layout(0).gradient(d.chunks[0])], dtype=torch.float32)
    gradient.fill_(2)
    assert d.send(m.PushPullShared(d.number(), JOB, 5, 1, 0, 1, 1, 0, 1, (), b"")) is None
    d.members(1, (0, 0), (1, 1))
    gradient.fill_(1000)  # it was only frozen, and writes once it goes on
    assert values_of(d.push_pull(0, 0, 1, ones(0, 0, 0, 0))) == [2, 1, 1, 1]


def test_the_open_end_of_a_pass_stays_ended() -> None:
    d = driver()
    assert d.end(1, 0, 3) is None
    d.members(1, (0, 0), (1, 1))
    assert d.greet(1, 1).ended == (0, 3)
    assert values_of(d.push_pull(0, 0, 1, ones(0, 4, 0, 0))) == [1, 4, 0, 0], "nobody waits for it"
    again = m.EndEpoch(d.number(), JOB, 1, 1, 0, 3)
    assert d.send(again) is None
    assert d.end(0, 0, 3) == m.Ack(d.number() - 1, 2)
    assert d.answers[again.request] == m.Ack(again.request, 2)


# ---------------------------------------------------------------- the end of a pass


def test_a_pass_that_is_over_is_answered_at_once_with_the_round() -> None:
    d = driver()
    d.end(0, 0, 0)
    d.end(1, 0, 0)
    d.members(1, (0, 0), (1, 1))
    answer = d.end(1, 0, 0, worker_epoch=1)
    assert isinstance(answer, m.Ack)
    assert answer.version == 1
    assert d.end(1, 0, 1, worker_epoch=1) is None, "the next is not"


def test_passes_are_remembered_for_a_while_only() -> None:
    d = driver()
    for epoch in range(20):
        for slot in (0, 1):
            d.end(slot, 0, epoch)
    assert d.end(0, 0, 4) is not None
    assert d.end(1, 0, 3) is None


def test_one_without_a_part_in_the_last_round_numbers_on_from_the_round() -> None:
    d = driver()
    d.push_pull(0, 0, 1, ones(0, 4, 0, 0))
    d.end(1, 0, 0)
    answer = d.end(0, 0, 0)
    assert isinstance(answer, m.Ack)
    assert answer.version == 2
    d.members(1, (0, 0), (1, 1))
    assert d.greet(1, 1).clock == 2
    assert d.greet(0).clock == 2
    d.push(0, 1, 2, ones(0, 0, 2, 0), worker_epoch=1)
    assert values_of(d.push_pull(0, 0, 2, ones(0, 0, 2, 0))) == [1, 4, 2, 0]


def test_one_that_has_ended_its_pass_gets_what_there_is_and_the_round_of_the_others() -> None:
    d = driver()
    d.end(1, 0, 0)
    for seq in (1, 2, 3):
        d.push_pull(0, 0, seq, ones(0, 1, 0, 0))
    d.members(1, (0, 0), (1, 1))
    assert d.greet(1, 1).clock == 4
    assert values_of(d.pull(0, 1, worker_epoch=1, version=1)) == [1, 3, 0, 0]


def test_chunks_that_a_lost_worker_left_a_round_apart_meet_again_after_the_pass() -> None:
    d = Driver(model(tensor("w", 8)), chunk_bytes=16, workers=3)
    d.init_all()
    d.push(0, 2, 0, ones(1, 1, 1, 1))  # to one chunk only
    for slot in (0, 1):
        d.end(slot, 0, 0)
    d.members(1, (0, 0), (1, 0))
    assert [d.shard.chunks[c].version for c in (0, 1)] == [1, 1]
    assert [d.greet(slot).clock for slot in (0, 1)] == [1, 1]
    # another shard was two rounds further, so that is where they all go on
    for chunk in (0, 1):
        for slot in (0, 1):
            d.push(chunk, slot, 3, ones(1, 1, 1, 1))
    assert [d.shard.chunks[c].version for c in (0, 1)] == [4, 4]


# ---------------------------------------------------------------- weights of one round


def test_weights_are_to_be_had_of_this_round_and_the_one_before() -> None:
    d = driver()
    assert values_of(d.pull(0, version=1)) == [1, 0, 0, 0]
    answer = d.pull(0, version=0)
    assert isinstance(answer, m.Weights)
    assert (answer.version, values_of(answer)) == (0, [0, 0, 0, 0])
    d.push_pull(0, 0, 1, ones(0, 2, 0, 0))
    d.push_pull(0, 1, 1, ones(0, 2, 0, 0))
    code, reason = refusal(d.pull(0, version=0))
    assert code == Refusal.STALE_SEQ
    assert "version 2" in reason


def test_a_round_to_come_is_waited_for_and_at_last_it_is_said_for_whom() -> None:
    d = driver()
    early, late = m.Pull(d.number(), JOB, 0, 0, 0, 2), m.Pull(d.number(), JOB, 0, 0, 0, 3)
    assert d.send(early) is None
    assert d.send(late) is None
    d.push(0, 0, 1, ones(0, 2, 0, 0))
    d.push(0, 1, 1, ones(0, 2, 0, 0))
    assert values_of(d.answers[early.request]) == [1, 2, 0, 0]
    d.push(0, 0, 2, ones(0, 2, 0, 0))
    [overdue] = d.tick(10.1)
    code, reason = refusal(overdue)
    assert code == Refusal.TIMED_OUT
    assert "worker/1" in reason
    assert "worker/0" not in reason
    assert "version 3" in reason


def test_without_previous_weights_only_this_round_is_to_be_had() -> None:
    d = driver(keep_previous=False)
    assert refusal(d.pull(0, version=0))[0] == Refusal.STALE_SEQ


def test_first_weights_are_waited_for_in_any_version() -> None:
    d = Driver()
    pull = m.Pull(d.number(), JOB, 1, 0, 0, 0)
    assert d.send(pull) is None
    d.init_all(3.0)
    assert values_of(d.answers[pull.request]) == [3, 3, 3, 3]


def test_whoever_reads_either_weights_slowly_keeps_what_they_were() -> None:
    d = driver()
    expected: dict[int, list[float]] = {}
    for seq in range(1, 6):
        d.sent = FakeSent()  # never done
        for version in (seq, seq - 1):
            pull = m.Pull(d.number(), JOB, 0, 0, 0, version)
            expected[pull.request] = values_of(d.send(pull))
        for slot in (0, 1):
            d.push(0, slot, seq, ones(1, 2, 3, 4))
        for request, view in d.views.items():
            assert torch.frombuffer(bytearray(view), dtype=torch.float32).tolist() == expected[request]
    assert len(expected) == 10


def test_previous_weights_take_no_new_memory_once_they_are_there() -> None:
    d = driver()
    stored = d.shard.chunks[0]
    homes = {stored.weights.data_ptr(), stored.previous.data_ptr()}
    for seq in range(1, 5):
        d.sent = FakeSent()
        d.pull(0)  # is still being sent when the update comes
        for slot in (0, 1):
            d.push(0, slot, seq, ones(1, 2, 3, 4))
        d.sent.done = True
        assert {stored.weights.data_ptr(), stored.previous.data_ptr()} == homes


def test_snapshots_hold_their_round_however_late_they_are_written() -> None:
    d = driver()
    d.snapshot(1)
    expected = d.weights().tolist()
    for seq in (1, 2, 3):
        for slot in (0, 1):
            d.push(0, slot, seq, ones(1, 2, 3, 4))
    [written] = d.written
    assert written.tensors["0.weights"].tolist() == expected


def test_previous_weights_of_a_chunk_that_lies_in_its_workers_memory() -> None:
    d = Driver(workers=1)
    d.init_all()
    memory = memoryview(bytearray(d.shard.shared_layout(0).nbytes))
    offer = m.AttachMemory(d.number(), JOB, 0, 0, 1, 1, bytes(16), True)
    d.greet(0)
    [effect] = d.shard.handle(b"peer of %d" % offer.request, offer, 0.0)
    assert isinstance(effect, Attach)
    d.carry_out(d.shard.attached(effect, memory))
    gradient = torch.frombuffer(memory[d.shard.shared_layout(0).gradient(d.chunks[0])], dtype=torch.float32)
    for seq in range(3):
        gradient.fill_(seq + 1)
        assert isinstance(
            d.send(m.PushPullShared(d.number(), JOB, 5, 0, 0, seq, 0, 0, 1, (0, seq), b"")), m.WeightsShared
        )
    assert d.shard.chunks[0].lodging
    here = torch.frombuffer(memory[d.shard.shared_layout(0).weights(d.chunks[0])], dtype=torch.float32)
    assert d.send(m.Pull(d.number(), JOB, 0, 0, 0, 2)) == m.WeightsShared(d.number() - 1, 0, 2)
    assert here.tolist() == [3] * 4
    assert d.weights().tolist() == [6] * 4, "the shard's own are where nobody writes"
    d.members(1, (0, 1))
    assert values_of(d.pull(0, 0, worker_epoch=1, version=2)) == [3] * 4
    assert values_of(d.pull(0, 0, worker_epoch=1, version=3)) == [6] * 4


# ---------------------------------------------------------------- NaN


def nan(slot: int, mode: str = "sync") -> Callable[[ShardDriver, int], m.Message | None]:
    return lambda d, seq: d.push_pull(0, slot, seq, ones(float("nan"), 1, 1, 1))


def skipping(mode: str, workers: int = 2, previous: bool = True) -> ShardDriver:
    d = Driver(workers=workers)
    d.shard = Shard(
        Identity(JOB, 0, 5), d.layout, parse_mode(mode), workers, 10.0, keep_previous=previous, skip_non_finite=True
    )
    d.init_all()
    return d


@pytest.mark.parametrize("mode", ["async", "ssp:1"])
def test_a_void_contribution_changes_the_version_only(mode: str) -> None:
    d = skipping(mode)
    answer = nan(0)(d, 0)
    assert isinstance(answer, m.Weights)
    assert (answer.version, values_of(answer)) == (1, [0, 0, 0, 0])
    assert nan(0)(d, 0) is not None, "a repeat is answered"
    assert values_of(d.push_pull(0, 1, 0, ones(1, 0, 0, 0))) == [1, 0, 0, 0]
    assert d.shard.stats.document()["non_finite"] == {"0": 1}
    assert d.shard.stats.applied == 1


def test_a_void_contribution_counts_for_its_round_and_is_left_out_of_the_mean() -> None:
    d = skipping("sync", 3)
    assert nan(1)(d, 0) is None
    d.push(0, 0, 0, ones(2, 0, 0, 0))
    answer = d.push_pull(0, 2, 0, ones(0, 4, 0, 0))
    assert values_of(answer) == [1, 2, 0, 0]
    for slot in range(3):
        answer = nan(slot)(d, 1)
    assert isinstance(answer, m.Weights)
    assert (answer.version, values_of(answer)) == (2, [1, 2, 0, 0])
    assert values_of(d.pull(0, version=1)) == [1, 2, 0, 0], "previous, and the same"
    assert d.shard.stats.document()["non_finite"] == {"0": 1, "1": 2, "2": 1}


def test_void_contributions_are_counted_once_for_all_chunks() -> None:
    d = Driver(model(tensor("w", 8)), chunk_bytes=16, workers=1, skip_non_finite=True)
    d.init_all()
    for seq in range(3):
        for chunk in (0, 1):
            d.push(chunk, 0, seq, ones(float("inf"), 0, 0, 0))
    assert d.shard.stats.non_finite == {0: 3}


def test_a_staged_payload_may_be_void() -> None:
    d = skipping("sync", 1)
    stage = m.Stage(d.number(), JOB, 0, 0, 0, payload(ones(float("nan"), 1, 1, 1)))
    staged = d.answer(stage)
    assert isinstance(staged, m.Staged)
    push = m.PushPullStaged(d.number(), JOB, 5, 0, 0, 0, 0, 0, 1, (), b"", stage.request, staged.digest)
    assert values_of(d.send(push)) == [0, 0, 0, 0]
    assert d.shard.chunks[0].version == 1


def test_so_may_one_in_shared_memory() -> None:
    d = skipping("sync", 1)
    memory = memoryview(bytearray(d.shard.shared_layout(0).nbytes))
    offer = m.AttachMemory(d.number(), JOB, 0, 0, 1, 1, bytes(16), True)
    [effect] = d.shard.handle(b"peer of %d" % offer.request, offer, 0.0)
    assert isinstance(effect, Attach)
    d.carry_out(d.shard.attached(effect, memory))
    gradient = torch.frombuffer(memory[d.shard.shared_layout(0).gradient(d.chunks[0])], dtype=torch.float32)
    for seq, value in enumerate((1.0, float("nan"), 2.0)):
        gradient.fill_(value)
        assert isinstance(d.send(m.PushPullShared(d.number(), JOB, 5, 0, 0, seq, 0, 0, 1, (), b"")), m.WeightsShared)
    assert d.weights().tolist() == [3] * 4
    assert d.shard.stats.non_finite == {0: 1}


# ---------------------------------------------------------------- bit for bit

WORKERS, PASSES = 3, 2
SPEC = model(tensor("w", 11), tensor("b", 4, dtype="float64"), rule="Adam", options=(ADAM,))


class Job:
    """Workers of a synchronous job, one pass after the other, whose processes may die between any two messages.

    A gradient is a function of what it is computed on, of the worker's slot and of the round, as a step whose random
    numbers are drawn from these is.
    """

    def __init__(self, steps: list[list[int]]) -> None:
        self.d = Driver(SPEC, WORKERS, chunk_bytes=20)
        self.d.init_all(0.5)
        self.steps = steps
        self.epochs = [0] * WORKERS
        self.version = 0
        self.pulls = [self._fetch(slot, -1) for slot in range(WORKERS)]
        self.seqs = [self.d.greet(slot).clock for slot in range(WORKERS)]

    def _fetch(self, slot: int, version: int) -> dict[int, int]:
        """Ask for weights; the requests by chunk."""
        requests = {}
        for chunk in self.d.chunks:
            self.d.pull(chunk.index, slot, worker_epoch=self.epochs[slot], version=version)
            requests[chunk.index] = self.d.number() - 1
        return requests

    def _gradient(self, slot: int, chunk: int) -> torch.Tensor:
        answer = self.d.answers[self.pulls[slot][chunk]]
        assert isinstance(answer, m.Weights), answer
        held = torch.frombuffer(bytearray(answer.payload), dtype=getattr(torch, self.d.chunks[chunk].dtype))
        seed = 100 * self.seqs[slot] + 10 * slot + chunk
        noise = torch.randn(held.numel(), generator=torch.Generator().manual_seed(seed), dtype=held.dtype)
        return held * (slot + 1) + noise

    def _send(self, slot: int, chunk: int, at: tuple[int, int]) -> None:
        gradient = self._gradient(slot, chunk)
        more = {"worker_epoch": self.epochs[slot], "samples": 1 + slot, "position": at}
        self.d.push_pull(chunk, slot, self.seqs[slot], gradient, **more)

    def die(self, slot: int) -> m.HelloReply:
        """Another process takes the slot."""
        self.epochs[slot] += 1
        self.version += 1
        self.d.members(self.version, *enumerate(self.epochs))
        reply = self.d.greet(slot, self.epochs[slot])
        self.pulls[slot] = self._fetch(slot, reply.clock)
        return reply

    def run(self, draw: Callable[[int], int]) -> None:
        """``draw`` n: a number below n; 0 means that nothing happens."""
        for epoch in range(PASSES):
            ended: set[int] = set()
            done = [0] * WORKERS
            while len(ended) < WORKERS:
                self._round(epoch, done, ended, draw)
            [version] = {s.version for s in self.d.shard.chunks.values()}
            for slot in range(WORKERS):
                if draw(4) == 1:
                    assert self.die(slot).clock == version
                    answer = self.d.end(slot, 0, epoch, self.epochs[slot])
                    assert isinstance(answer, m.Ack), "over, so answered at once"
                    assert answer.version == version
                self.seqs[slot] = version
                self.pulls[slot] = self._fetch(slot, version)

    def _round(self, epoch: int, done: list[int], ended: set[int], draw: Callable[[int], int]) -> None:
        active = [slot for slot in range(WORKERS) if slot not in ended and done[slot] < self.steps[epoch][slot]]
        for slot in range(WORKERS):
            if slot not in ended and slot not in active:
                self.d.end(slot, 0, epoch, self.epochs[slot])
                ended.add(slot)
                if draw(4) == 1:
                    assert self.die(slot).ended == (0, epoch)
                    over = self.d.end(slot, 0, epoch, self.epochs[slot])
                    assert (over is not None) == (len(ended) == WORKERS)
        for slot in active:
            at = (epoch, done[slot] + 1)
            before = (epoch, done[slot]) if done[slot] else None
            chunks = [c.index for c in self.d.chunks]
            for _ in range(3):
                if not (doomed := draw(len(chunks) + 3)):
                    break
                for chunk in chunks[: doomed - 1]:
                    self._send(slot, chunk, at)
                last = self.seqs[slot]
                reply = self.die(slot)
                assert reply.clock == (last + 1 if doomed > len(chunks) else last)
                if reply.clock == last and before is not None:
                    assert reply.position == before
                if reply.clock > last:
                    assert reply.position == at
                    break
            if doomed <= len(chunks):
                for chunk in chunks:
                    self._send(slot, chunk, at)
        for slot in active:
            done[slot] += 1
            self.seqs[slot] += 1
            if draw(5) == 1:  # applied, and not heard of
                assert self.die(slot).clock == self.seqs[slot]
            else:
                self.pulls[slot] = self._fetch(slot, self.seqs[slot])

    def state(self) -> list[Any]:
        """Weights, the rule's state and versions, as bytes."""
        found: list[Any] = []
        self.d.snapshot(1)
        [written] = self.d.written
        for name, values in sorted(written.tensors.items()):
            found.append((name, bytes(payload(values))))
        for index, row in sorted(written.document["chunks"].items()):
            found.append((index, row["version"], sorted(row["scalars"].items())))
        return found


@pytest.mark.parametrize("seed", range(60))
def test_whoever_dies_when_the_bytes_are_those_of_a_run_without_deaths(seed: int) -> None:
    choices = random.Random(seed)
    steps = [[choices.randint(0, 3) for _ in range(WORKERS)] for _ in range(PASSES)]
    calm, stormy = Job(steps), Job(steps)
    calm.run(lambda _: 0)
    stormy.run(choices.randrange)
    assert stormy.state() == calm.state()


def test_a_layout_without_trainable_chunks_has_no_rounds() -> None:
    spec = model(tensor("mean", 2, kind="buffer"), options=ADD)
    assert not plan(spec, 1, 8).by_kind["trainable"]
    d = Driver(spec)
    d.init_all()
    assert d.greet(0).clock == 0
    d.end(0, 0, 0)
    answer = d.end(1, 0, 0)
    assert isinstance(answer, m.Ack)
    assert answer.version == 0
