"""A shard whose contributions or weights are encoded: what it takes, what it answers, what it keeps for later."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from unit_kit import JOB, ShardDriver, model, refusal, tensor

from downpour_common import messages as m
from downpour_common.codecs import codec_for
from downpour_common.codecs.base import Codec, as_memory, as_tensor
from downpour_common.codecs.feedback import seed_of
from downpour_common.compression import parse_compression
from downpour_common.modes import parse_mode
from downpour_server.coding import ChunkCoding
from downpour_server.effects import NOBODY, Reply
from downpour_server.shard import Identity, Shard
from downpour_server.state import STATE, attributes

NUMEL = 64
ONES = torch.ones(NUMEL)


def driver(compress: str, mode: str = "async", workers: int = 2) -> ShardDriver:
    """One chunk, whose contributions are added to its weights, which begin at 0."""
    d = ShardDriver(model(tensor("w", NUMEL)), mode, workers)
    d.shard = shard_of(d, compress, mode, workers)
    d.init_all()
    return d


def shard_of(d: ShardDriver, compress: str, mode: str, workers: int) -> Shard:
    compression = parse_compression(compress)
    return Shard(Identity(JOB, 0, 5), d.layout, parse_mode(mode), workers, 10.0, compression=compression)


def codec_of(compress: str) -> Codec:
    compression = parse_compression(compress)
    choice = compression.push or compression.pull
    assert choice is not None
    return codec_for(choice)


def encoded(codec: Codec, flat: torch.Tensor, seq: int) -> bytes:
    data = torch.empty(codec.nbytes(NUMEL), dtype=torch.uint8)
    codec.encode(flat, data, seed_of(0, seq))
    return bytes(as_memory(data))


def held(d: ShardDriver, slot: int, seq: int, values: torch.Tensor | bytes, view: int) -> m.Message | None:
    """A push-pull of a worker that has this view."""
    return d.send(holding(d.pushed(0, slot, seq, values), view))


def holding(push: m.Contribution, view: int) -> m.PushPullHeld:
    """The same with a view."""
    return m.PushPullHeld(**{f.name: getattr(push, f.name) for f in fields(push)}, held=view)


class Worker:
    """What a worker has, by what it is answered."""

    def __init__(self, compress: str) -> None:
        self.codec = codec_of(compress)
        self.flat = torch.zeros(NUMEL)
        self.view = 0

    def take(self, message: m.Message | None) -> m.WeightsCoded:
        assert isinstance(message, m.WeightsCoded), message
        data = as_tensor(message.payload)
        if message.base == 0:
            self.flat = data.view(torch.float32).clone()
        else:
            assert message.base == self.view
            step = torch.empty(NUMEL)
            self.codec.decode(data, step, seed_of(0, message.view))
            self.flat = self.flat + step
        self.view = message.view
        return message


@pytest.mark.parametrize("codec", ["int8", "topk:0.1", "randomk:0.5", "1bit"])
def test_contributions_are_decoded(codec: str) -> None:
    d, flat = driver(f"push={codec}"), torch.linspace(-1, 1, NUMEL)
    made = codec_of(f"push={codec}")
    d.push_pull(0, 0, 0, encoded(made, flat, 0))
    wanted = torch.empty(NUMEL)
    made.decode(as_tensor(encoded(made, flat, 0)), wanted, seed_of(0, 0))
    assert torch.equal(d.weights(), wanted)
    assert d.shard.stats.bytes_in == made.nbytes(NUMEL)
    d.push_pull(0, 0, 0, encoded(made, flat, 0))
    assert torch.equal(d.weights(), wanted), "a repeat changes nothing"


@pytest.mark.parametrize("payload", [ONES, b"", b"\xff" * 55, b"\xff" * 57])
def test_what_has_another_size_is_refused_before_it_is_looked_at(payload: torch.Tensor | bytes) -> None:
    d = driver("push=topk:0.1")
    assert codec_of("push=topk:0.1").nbytes(NUMEL) == 56
    code, reason = refusal(d.push_pull(0, 0, 0, payload))
    assert code == m.Refusal.MALFORMED
    assert "56 bytes" in reason


def test_what_cannot_be_decoded_is_refused() -> None:
    assert refusal(driver("push=topk:0.1").push_pull(0, 0, 0, b"\xff" * 56))[0] == m.Refusal.MALFORMED


def test_what_is_spoilt_is_not_finite() -> None:
    d, codec = driver("push=topk:0.1"), codec_of("push=topk:0.1")
    data = torch.empty(56, dtype=torch.uint8)
    codec.spoil(data)
    assert refusal(d.push_pull(0, 0, 0, bytes(as_memory(data))))[0] == m.Refusal.NON_FINITE
    assert not d.weights().any()


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_whole_weights_are_encoded_from_the_masters_each_time(codec: str) -> None:
    d, made = driver(f"pull={codec}"), codec_of(f"pull={codec}")
    for seq in range(3):
        message = d.push_pull(0, 0, seq, torch.linspace(0, 1, NUMEL))
        assert isinstance(message, m.WeightsCoded)
        assert (message.view, message.base, message.version) == (0, 0, seq + 1)
        assert bytes(message.payload) == encoded(made, d.weights(), 0)
    assert isinstance(d.pull(0), m.Weights), "who wants them as they are gets them so"
    assert isinstance(d.pull(0, held=0), m.WeightsCoded)


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("codec", ["topk:0.2", "1bit", "randomk:0.2"])
def test_differences_lead_to_the_weights(codec: str, mode: str) -> None:
    d, worker = driver(f"pull={codec}", mode, 1), Worker(f"pull={codec}")
    torch.manual_seed(1)
    for seq in range(40):
        step = torch.randn(NUMEL) if seq < 10 else torch.zeros(NUMEL)
        message = worker.take(held(d, 0, seq, step, worker.view))
        if seq:
            assert memoryview(message.payload).nbytes == worker.codec.nbytes(NUMEL)
    torch.testing.assert_close(worker.flat, d.weights(), rtol=0, atol=0.3)


def test_a_view_that_is_not_the_known_one_is_sent_whole() -> None:
    """As after an answer that was lost with a shard's leader, or for a worker that begins."""
    d, worker = driver("pull=topk:0.1", workers=1), Worker("pull=topk:0.1")
    worker.take(held(d, 0, 0, ONES, 0))
    assert worker.take(held(d, 0, 1, ONES, worker.view)).base
    held(d, 0, 2, ONES, worker.view)  # an answer that does not arrive
    assert worker.take(held(d, 0, 2, ONES, worker.view)).base == 0
    assert torch.equal(worker.flat, d.weights())
    d.shard.lead(6)
    assert worker.take(d.pull(0, held=worker.view)).base == 0, "another leader knows nothing"
    d.members(1, (0, 1))
    assert worker.take(d.pull(0, held=worker.view, worker_epoch=1)).base == 0, "nor of another worker"


def test_in_sync_the_same_request_is_answered_with_the_same_bytes() -> None:
    d, worker = driver("pull=2bit", "sync", 1), Worker("pull=2bit")
    worker.take(held(d, 0, 0, ONES, 0))
    first = held(d, 0, 1, torch.linspace(0, 1, NUMEL), worker.view)
    again = worker.take(held(d, 0, 1, torch.linspace(0, 1, NUMEL), worker.view))
    assert isinstance(first, m.WeightsCoded)
    assert (first.base, bytes(first.payload)) == (again.base, bytes(again.payload))
    assert first.base > 0


def test_in_sync_all_have_the_same_view() -> None:
    d, workers = driver("pull=1bit", "sync"), [Worker("pull=1bit") for _ in range(2)]
    for seq in range(5):
        requests = []
        for slot, worker in enumerate(workers):
            push = holding(d.pushed(0, slot, seq, torch.linspace(slot, 1, NUMEL)), worker.view)
            requests.append(push.request)
            d.send(push)
        for request, worker in zip(requests, workers, strict=True):
            worker.take(d.answers[request])
        assert torch.equal(workers[0].flat, workers[1].flat)
    late = Worker("pull=1bit")
    late.take(d.pull(0, held=0))
    assert torch.equal(late.flat, workers[0].flat), "who comes gets the view, not the weights"


def test_a_snapshot_of_a_clock_waits_for_what_is_owed() -> None:
    d, made = driver("push=topk:0.1", "sync"), codec_of("push=topk:0.1")
    asked: list[Reply] = []
    send = d.carry_out

    def carry_out(effects: list[Any]) -> None:
        asked.extend(e for e in effects if isinstance(e, Reply) and isinstance(e.message, m.ResidualWanted))
        send([e for e in effects if not (isinstance(e, Reply) and isinstance(e.message, m.ResidualWanted))])

    d.carry_out = carry_out  # type: ignore[method-assign]
    d.snapshot(7, at_clock=2)
    for seq in range(3):
        for slot in range(2):
            d.push_pull(0, slot, seq, encoded(made, ONES, seq))
    assert [e.message for e in asked] == [m.ResidualWanted(JOB, 7, 0)] * 2, "once of each, before the answers"
    assert not d.written
    for slot in range(2):
        owed = bytes(as_memory(torch.full((NUMEL,), slot + 1.0).view(torch.uint8)))
        d.send(m.Residual(d.number(), JOB, slot, 0, 6, 0, owed))  # of another snapshot
        assert not d.written
        d.send(m.Residual(d.number(), JOB, slot, 0, 7, 0, owed))
    tensors = d.written[0].tensors
    assert [float(tensors[f"0.codec.residual.{slot}"][0]) for slot in range(2)] == [1.0, 2.0]

    other = driver("push=topk:0.1", "sync")
    stored = other.shard.chunks[0]
    state = {name.removeprefix("0."): t for name, t in tensors.items() if name != "0.weights"}
    stored.restore(tensors["0.weights"], state, 2)
    other.shard.start_from(2)
    hello = other.hello(1)
    assert isinstance(hello, m.HelloReply)
    assert hello.residuals
    kept = other.answer(m.FetchResidual(other.number(), JOB, 1, 0, 0))
    assert isinstance(kept, m.ResidualKept)
    assert float(as_tensor(kept.payload).view(torch.float32)[0]) == 2.0
    other.push_pull(0, 1, 2, encoded(made, ONES, 2))
    assert other.answer(m.FetchResidual(other.number(), JOB, 1, 0, 0)) == m.ResidualKept(other._request, 0, b"")


def test_who_leaves_owes_nothing_to_a_snapshot() -> None:
    d, made = driver("push=int8", "sync", 1), codec_of("push=int8")
    d.snapshot(7, at_clock=1)
    send = d.carry_out
    d.carry_out = lambda effects: send([e for e in effects if not _wanted(e)])  # type: ignore[method-assign]
    d.push_pull(0, 0, 0, encoded(made, ONES, 0))
    assert not d.written
    d.leave(0)
    assert d.written
    assert not d.written[0].error


@pytest.mark.parametrize("in_order", [True, False])
def test_what_a_worker_had_is_forgotten_when_it_is_gone(in_order: bool) -> None:
    """It is as much memory as the weights are."""
    d = driver("pull=topk:0.5")
    d.members(1, (0, 0), (1, 0))
    for slot in range(2):
        held(d, slot, 0, ONES, 0)
    coding = d.shard.chunks[0].coding
    assert coding is not None
    assert sorted(coding._views) == [0, 1]
    if in_order:
        d.leave(1)
    else:
        d.members(2, (0, 0))
    assert sorted(coding._views) == [0]


def test_views_of_a_former_shard_have_other_numbers() -> None:
    """So that none is mistaken for one of this shard's, even if the answer that tells of it is lost."""
    d = driver("pull=topk:0.5")
    before = held(d, 0, 0, ONES, 0)
    assert isinstance(before, m.WeightsCoded)
    after = driver("pull=topk:0.5")
    after.shard.recovered(0)
    for seq in range(2):
        sent = held(after, 0, seq, ONES, before.view)
        assert isinstance(sent, m.WeightsCoded)
        assert (sent.base, sent.view == before.view) == (0, False)


def test_a_follower_encodes_no_answers() -> None:
    d = driver("pull=topk:0.5")
    d.shard.handle(NOBODY, holding(d.pushed(0, 0, 0, ONES), 0), 0.0)
    coding = d.shard.chunks[0].coding
    assert coding is not None
    assert not coding._views
    assert d.weights().tolist() == [1.0] * NUMEL


def _wanted(effect: object) -> bool:
    return isinstance(effect, Reply) and isinstance(effect.message, m.ResidualWanted)


def test_every_attribute_of_a_coding_is_accounted_for() -> None:
    coding = driver("push=1bit,pull=2bit").shard.chunks[0].coding
    assert coding is not None
    known = STATE[ChunkCoding]
    assert attributes(coding) == known.carried | known.apart | known.own
