"""Weights in the memory of a sole worker: there from its first answer on, back home before anybody else needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from unit_kit import JOB, FakeSent, ShardDriver, model, refusal, tensor, values_of

from downpour_common import messages as m
from downpour_common.messages import Refusal
from downpour_server.effects import Attach

SPEC = model(tensor("a", 5), tensor("b", 3, dtype="float64"), tensor("mean", 2, kind="buffer"))


class Worker:
    """A worker of a shard under test, with memory of its own that it has attached."""

    def __init__(self, driver: ShardDriver, slot: int = 0, epoch: int = 0, in_place: bool = True) -> None:
        self.driver, self.slot, self.epoch = driver, slot, epoch
        self.memory = memoryview(bytearray(driver.shard.shared_layout(0).nbytes))
        offer = m.AttachMemory(driver.number(), JOB, slot, epoch, 1, 1, bytes(16), in_place)
        peer = b"peer of %d" % offer.request
        [effect] = driver.shard.handle(peer, offer, 0.0)
        assert isinstance(effect, Attach)
        driver.carry_out(driver.shard.attached(effect, self.memory))
        assert driver.answers[offer.request] == m.Ack(offer.request, 0)

    def _area(self, area: slice, chunk: int) -> torch.Tensor:
        return torch.frombuffer(self.memory[area], dtype=getattr(torch, self.driver.layout.chunks[chunk].dtype))

    def weights(self, chunk: int = 0) -> torch.Tensor:
        return self._area(self.driver.shard.shared_layout(0).weights(self.driver.layout.chunks[chunk]), chunk)

    def gradient(self, chunk: int = 0) -> torch.Tensor:
        return self._area(self.driver.shard.shared_layout(0).gradient(self.driver.layout.chunks[chunk]), chunk)

    def step(self, seq: int, gradient: float = 1.0, chunk: int = 0, **others: Any) -> m.Message | None:
        """Push-pull a gradient that is the same everywhere; the answer, or None while there is none."""
        self.gradient(chunk).fill_(gradient)
        fields = {"job": JOB, "shard_epoch": self.driver.shard.identity.shard_epoch, "slot": self.slot}
        fields |= {"worker_epoch": self.epoch, "seq": seq, "base_version": 0, "chunk": chunk}
        fields |= {"samples": 1, "position": (), "hyper": b"", **others}
        return self.driver.send(m.PushPullShared(self.driver.number(), **fields))

    def pull(self, chunk: int = 0) -> m.Message | None:
        return self.driver.pull(chunk, self.slot, worker_epoch=self.epoch)

    def lodges(self, chunk: int = 0) -> bool:
        """Whether the shard's weights are this worker's."""
        return self.driver.shard.chunks[chunk].weights.data_ptr() == self.weights(chunk).data_ptr()


def sole(mode: str = "async", in_place: bool = True) -> tuple[ShardDriver, Worker]:
    """A shard with one worker, weights all zero."""
    driver = ShardDriver(SPEC, mode, workers=1)
    driver.init_all()
    return driver, Worker(driver, in_place=in_place)


def at_home(driver: ShardDriver) -> bool:
    return not any(stored.lodging for stored in driver.shard.chunks.values())


@pytest.mark.parametrize("mode", ["async", "ssp:1", "sync"])
def test_a_sole_workers_weights_are_the_shards_from_its_first_answer_on(mode: str) -> None:
    _, worker = sole(mode)
    assert not worker.lodges(), "nothing moves before the worker has asked"
    assert isinstance(worker.step(0), m.WeightsShared)
    assert worker.lodges()
    assert worker.weights().tolist() == [1.0] * 5
    answer = worker.step(1, 2.0)
    assert isinstance(answer, m.WeightsShared)
    assert answer.version == 2
    assert worker.weights().tolist() == [3.0] * 5
    assert worker.lodges()
    assert not worker.lodges(1), "each chunk at its own first answer"
    worker.step(0, chunk=1)
    assert worker.lodges(1)
    assert worker.gradient().tolist() == [2.0] * 5, "a gradient stays as it is"


def test_what_it_computes_is_the_same_bit_for_bit() -> None:
    spec = model(tensor("a", 1001), rule="Adam", options=[{"lr": 0.01, "weight_decay": 0.1}])
    results = []
    for in_place in (True, False):
        driver = ShardDriver(spec, workers=1)
        driver.init(0, torch.linspace(-1, 1, 1001))
        worker = Worker(driver, in_place=in_place)
        for seq in range(5):
            worker.step(seq, 0.1 * seq - 0.17)
        assert worker.lodges() is in_place
        results.append(worker.weights().clone())
    assert torch.equal(*results)


def test_memory_that_was_not_offered_for_it_holds_copies() -> None:
    _, worker = sole(in_place=False)
    worker.step(0)
    assert not worker.lodges()
    assert worker.weights().tolist() == [1.0] * 5
    assert isinstance(worker.pull(), m.Weights)


def test_several_workers_get_copies() -> None:
    driver = ShardDriver(SPEC, workers=2)
    driver.init_all()
    first, second = Worker(driver), Worker(driver, 1)
    first.step(0)
    second.step(0)
    first.step(1)
    assert at_home(driver)
    assert (first.weights()[0], second.weights()[0]) == (3.0, 2.0)


def test_buffers_never_move() -> None:
    driver, worker = sole()
    buffer = driver.layout.by_kind["buffer"][0].index
    assert refusal(_shared_push(driver, buffer))[0] == Refusal.NOT_SHARED
    driver.push(buffer, 0, 0, torch.ones(2))
    worker.step(0)
    driver.push(buffer, 0, 1, torch.ones(2))
    assert isinstance(worker.pull(buffer), m.Weights)
    worker.step(1)
    assert worker.lodges(), "pushes of buffers say nothing about the weights"


def _shared_push(driver: ShardDriver, chunk: int) -> m.Message | None:
    epoch = driver.shard.identity.shard_epoch
    return driver.send(m.PushPullShared(driver.number(), JOB, epoch, 0, 0, 0, 0, chunk, 1, (), b""))


# ---------------------------------------------------------------- what ends it


def _second_member(driver: ShardDriver, _worker: Worker) -> None:
    driver.members(1, (0, 0), (1, 0))


def _replaced(driver: ShardDriver, _worker: Worker) -> None:
    driver.members(1, (0, 1))


def _dismissed(driver: ShardDriver, _worker: Worker) -> None:
    driver.members(1)


def _newer_epoch_speaks(driver: ShardDriver, _worker: Worker) -> None:
    driver.hello(worker_epoch=1)


def _leaves(driver: ShardDriver, _worker: Worker) -> None:
    driver.leave(0)


def _pushes_only(driver: ShardDriver, _worker: Worker) -> None:
    driver.push(0, 0, 7, torch.zeros(5))


def _sends_a_payload(driver: ShardDriver, _worker: Worker) -> None:
    driver.push_pull(0, 0, 7, torch.zeros(5))


def _attaches_other_memory(_driver: ShardDriver, worker: Worker) -> None:
    Worker(worker.driver)


@pytest.mark.parametrize(
    "event",
    [
        _second_member,
        _replaced,
        _dismissed,
        _newer_epoch_speaks,
        _leaves,
        _pushes_only,
        _sends_a_payload,
        _attaches_other_memory,
    ],
)
def test_the_weights_are_home_before_anything_else_happens(event: Callable[[ShardDriver, Worker], None]) -> None:
    driver, worker = sole()
    worker.step(0)
    worker.step(0, chunk=1)
    assert worker.lodges()
    assert worker.lodges(1)
    event(driver, worker)
    assert at_home(driver)
    worker.weights().fill_(99.0)
    worker.weights(1).fill_(99.0)
    assert driver.weights(0).tolist() == [1.0] * 5, "nothing is lost, and what it writes now is its own"
    assert driver.weights(1).tolist() == [1.0] * 3


def test_a_second_member_that_goes_again_lets_the_weights_move_back() -> None:
    driver, first = sole()
    first.step(0)
    driver.members(1, (0, 0), (1, 0))
    second = Worker(driver, 1)
    assert isinstance(second.step(0), m.WeightsShared)
    assert isinstance(first.step(1), m.WeightsShared)
    assert at_home(driver)
    driver.members(2, (0, 0))
    assert at_home(driver), "the worker may be reading its weights now"
    assert first.weights().tolist() == [3.0] * 5
    first.step(2)
    assert first.lodges()
    assert first.weights().tolist() == [4.0] * 5


def test_a_replacement_attaches_anew() -> None:
    driver, worker = sole()
    worker.step(0)
    driver.members(1, (0, 1))
    assert refusal(worker.step(1))[0] == Refusal.STALE_EPOCH
    heir = Worker(driver, epoch=1)
    heir.step(0)
    assert heir.lodges()
    assert heir.weights().tolist() == [2.0] * 5
    worker.weights().fill_(99.0)
    assert driver.weights().tolist() == [2.0] * 5


def test_a_push_alone_never_changes_the_weights_under_the_workers_hands() -> None:
    driver, worker = sole()
    worker.step(0)
    driver.push(0, 0, 1, torch.ones(5))
    assert worker.weights().tolist() == [1.0] * 5
    assert driver.weights().tolist() == [2.0] * 5
    worker.step(2)
    assert not worker.lodges(), "not again: there may be more"
    assert worker.weights().tolist() == [3.0] * 5


def test_after_leaving_nothing_moves_in_again() -> None:
    driver, worker = sole()
    driver.leave(0)
    worker.step(0)
    assert at_home(driver)


# ---------------------------------------------------------------- readers


def test_a_pull_is_answered_through_the_memory() -> None:
    """A payload would be copied there by the worker at some later moment, over newer weights."""
    driver, worker = sole()
    assert worker.pull() == m.WeightsShared(driver._request, 0, 0)
    worker.step(0)
    worker.weights().fill_(7.0)  # what a script writes
    assert worker.pull() == m.WeightsShared(driver._request, 0, 1)
    worker.step(1)
    assert worker.weights().tolist() == [8.0] * 5


def test_pulls_of_several_workers_are_answered_through_their_memory() -> None:
    driver = ShardDriver(SPEC, workers=2)
    driver.init_all(4.0)
    workers = Worker(driver), Worker(driver, 1, in_place=False)
    assert isinstance(workers[0].pull(), m.WeightsShared)
    assert workers[0].weights().tolist() == [4.0] * 5
    assert values_of(workers[1].pull()) == [4.0] * 5


def test_a_reader_of_before_keeps_what_it_was_sent() -> None:
    driver = ShardDriver(SPEC, workers=1)
    driver.init_all()
    driver.sent = FakeSent()
    assert values_of(driver.pull(0)) == [0.0] * 5  # not attached yet: from the shard's own memory
    [view] = driver.views.values()
    worker = Worker(driver)
    worker.step(0)
    worker.step(1)
    assert worker.lodges()
    assert torch.frombuffer(view, dtype=torch.float32).tolist() == [0.0] * 5


def test_weights_in_a_workers_memory_are_copied_to_be_sent() -> None:
    driver, worker = sole()
    worker.step(0)
    stored = driver.shard.chunks[0]
    view = stored.payload()
    stored.being_read(FakeSent())
    worker.step(1)
    assert torch.frombuffer(view, dtype=torch.float32).tolist() == [1.0] * 5
    assert worker.lodges()


def test_a_snapshot_is_a_copy() -> None:
    driver, worker = sole()
    worker.step(0)
    driver.snapshot()
    worker.step(1)
    [written] = driver.written
    assert written.tensors["0.weights"].tolist() == [1.0] * 5


# ---------------------------------------------------------------- refusals and repeats


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    driver, worker = sole()
    worker.step(0)
    assert refusal(worker.step(1, float("nan")))[0] == Refusal.NON_FINITE
    assert worker.weights().tolist() == [1.0] * 5
    assert isinstance(worker.step(1), m.WeightsShared), "it left no trace"
    assert driver.weights().tolist() == [2.0] * 5


def test_a_repeat_is_answered_and_not_applied() -> None:
    driver, worker = sole()
    worker.step(0)
    assert worker.step(0) == m.WeightsShared(driver._request, 0, 1)
    assert worker.weights().tolist() == [1.0] * 5
    assert worker.lodges()
