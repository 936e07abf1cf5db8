"""The shard as a state machine: what is applied, how often, in which order, and who is answered when.

Ledger: SGD that maximizes with a learning rate of 1 adds gradients to the weights, and every contribution is one-hot
at a place of its own, so the weights tell exactly which contributions were applied, and how often.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit_kit import ADD, JOB, FakeSent, ShardDriver, model, refusal, tensor, values_of

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import ProtocolError
from downpour_common.messages import Refusal
from downpour_server.contribution import Contribution
from downpour_server.snapshot import Reading
from downpour_server.store import StoredChunk

ONE = model(tensor("w", 4))
MODES = ["async", "ssp:1", "sync"]


def ones(*values: float) -> torch.Tensor:
    """A vector of float32."""
    return torch.tensor(values, dtype=torch.float32)


def driver(mode: str = "async", workers: int = 2, initialise: bool = True) -> ShardDriver:
    """One chunk of four zeros."""
    made = ShardDriver(ONE, mode, workers)
    if initialise:
        made.init_all()
    return made


# ---------------------------------------------------------------- joining


def test_hello_tells_the_shard_its_epoch_and_the_clock_to_start_from() -> None:
    d = driver()
    d.shard.start_from(70)
    answer = d.hello(slot=1)
    assert isinstance(answer, m.HelloReply)
    assert (answer.shard, answer.shard_epoch, answer.clock) == (0, 5, 70)


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"digest": "0" * 32}, Refusal.MODEL_DIFFERS, "worker/0"),
        ({"job": "job-2"}, Refusal.WRONG_JOB, "job-2"),
        ({"slot": 2}, Refusal.MALFORMED, "slot 2"),
        ({"slot": -1}, Refusal.MALFORMED, "slot -1"),
    ],
)
def test_hello_of_a_stranger_is_refused(fields: dict[str, object], code: Refusal, words: str) -> None:
    found, reason = refusal(driver().hello(**fields))  # type: ignore[arg-type]
    assert found == code
    assert words in reason


def test_a_replaced_worker_is_refused_whatever_it_says() -> None:
    d = driver()
    d.hello(slot=1, worker_epoch=3)
    old = {"slot": 1, "worker_epoch": 2}
    requests = [
        m.Hello(d.number(), JOB, 1, 2, d.layout.digest),
        m.Init(d.number(), JOB, 1, 2, 0, bytes(16)),
        m.Pull(d.number(), JOB, 1, 2, 0),
        d.pushed(0, seq=0, values=ones(1, 1, 1, 1), **old),  # type: ignore[arg-type]
        d.pushed(0, seq=0, values=ones(1, 1, 1, 1), fetch=False, **old),
        m.EndEpoch(d.number(), JOB, 1, 2),
        m.Leave(d.number(), JOB, 1, 2),
    ]
    for request in requests:
        code, reason = refusal(d.send(request))
        assert code == Refusal.STALE_EPOCH, request
        assert "worker/1" in reason
    assert d.weights().tolist() == [0, 0, 0, 0]
    assert isinstance(d.push(0, 1, 0, ones(1, 0, 0, 0), worker_epoch=3), m.Ack), "the new one goes on"


def test_a_new_epoch_of_a_worker_counts_its_contributions_anew() -> None:
    d = driver()
    d.push(0, 0, 0, ones(1, 0, 0, 0))
    d.push(0, 0, 0, ones(0, 1, 0, 0), worker_epoch=1)
    d.push(0, 0, 0, ones(0, 1, 0, 0), worker_epoch=1)
    assert d.weights().tolist() == [1, 1, 0, 0], "its own repeats are repeats"
    assert refusal(d.push(0, 0, 1, ones(0, 0, 1, 0)))[0] == Refusal.STALE_EPOCH


def test_a_contribution_for_a_later_epoch_of_the_shard_is_refused() -> None:
    d = driver()
    code, reason = refusal(d.push(0, 0, 0, ones(1, 1, 1, 1), shard_epoch=6))
    assert code == Refusal.STALE_EPOCH
    assert "6" in reason
    assert d.weights().tolist() == [0, 0, 0, 0]


def test_a_contribution_for_a_former_process_of_the_shard_is_not_taken_and_will_come_again() -> None:
    d = driver()
    assert d.push_pull(0, 0, 0, ones(1, 1, 1, 1), shard_epoch=4) is None
    assert d.weights().tolist() == [0, 0, 0, 0]
    d.push(0, 0, 0, ones(1, 1, 1, 1))
    assert d.weights().tolist() != [0, 0, 0, 0]


def test_a_shard_does_not_take_what_is_not_meant_for_shards() -> None:
    with pytest.raises(ProtocolError, match="StopShard"):
        driver().shard.handle(b"", m.StopShard(), 0.0)


# ---------------------------------------------------------------- first weights


def test_first_weights_count_once() -> None:
    d = driver(initialise=False)
    assert isinstance(d.init(0, ones(1, 2, 3, 4)), m.Ack)
    assert isinstance(d.init(0, ones(9, 9, 9, 9), slot=1), m.Ack), "a repeat is answered"
    assert values_of(d.pull(0)) == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", MODES)
def test_a_pull_waits_for_the_first_weights(mode: str) -> None:
    d = driver(mode, initialise=False)
    asked = m.Pull(d.number(), JOB, 1, 0, 0)
    assert d.send(asked) is None
    d.init(0, ones(1, 2, 3, 4))
    assert values_of(d.answers[asked.request]) == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", MODES)
def test_a_pull_that_waits_too_long_for_the_first_weights_names_the_chief(mode: str) -> None:
    d = driver(mode, initialise=False)
    d.pull(0, slot=1)
    assert d.tick(10.0) == []
    code, reason = refusal(d.tick(10.5)[0])
    assert code == Refusal.TIMED_OUT
    assert "initial weights of worker/0" in reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    d = driver(initialise=False)
    code, reason = refusal(d.init(0, ones(0, bad, 0, 0)))
    assert code == Refusal.NON_FINITE
    assert "w" in reason
    assert d.pull(0) is None, "there are no first weights yet"


def test_a_contribution_before_the_first_weights_is_not_lost() -> None:
    """It is refused, or it counts; an Ack for something that vanishes is neither."""
    d = driver(initialise=False)
    answer = d.push(0, 1, 0, ones(1, 0, 0, 0))
    d.init(0, ones(0, 0, 0, 5))
    applied = d.weights().tolist() == [1, 0, 0, 5]
    assert applied or isinstance(answer, m.Refused)


# ---------------------------------------------------------------- what is refused changes nothing


def _state(d: ShardDriver) -> list[object]:
    return [(s.weights.tolist(), s.version, s.capture(Reading())[1]["scalars"]) for s in d.shard.chunks.values()]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fetch", [False, True])
def test_a_contribution_that_is_not_finite_is_refused_and_changes_nothing(dtype: str, bad: float, fetch: bool) -> None:
    spec = model(tensor("w", 4, dtype=dtype), rule="Adam", options=({"lr": 0.5},))
    d = ShardDriver(spec)
    d.init_all(1.0)
    of = getattr(torch, dtype)
    d.push(0, 0, 0, torch.ones(4, dtype=of))
    before = _state(d)
    code, reason = refusal(d.send(d.pushed(0, 0, 1, torch.tensor([0, bad, 0, 0], dtype=of), fetch)))
    assert code == Refusal.NON_FINITE
    assert "worker/0" in reason
    assert _state(d) == before
    assert isinstance(d.push(0, 0, 1, torch.ones(4, dtype=of)), m.Ack), "the same number may come again, repaired"
    assert _state(d) != before


def test_large_finite_gradients_are_finite() -> None:
    """Their sum overflows; they do not."""
    d = driver()
    assert isinstance(d.push(0, 0, 0, ones(3e38, 3e38, 3e38, 0)), m.Ack)
    assert d.weights().isfinite().all()


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_a_payload_of_another_size_is_refused(size: int) -> None:
    d = driver(initialise=False)
    assert refusal(d.init(0, bytes(size)))[0] == Refusal.MALFORMED
    d.init_all()
    before = _state(d)
    for fetch in (False, True):
        code, reason = refusal(d.send(d.pushed(0, 0, 0, bytes(size), fetch)))
        assert code == Refusal.MALFORMED
        assert "16 bytes" in reason
        assert str(size) in reason
    assert _state(d) == before


@pytest.mark.parametrize("chunk", [1, 999, -1])
def test_a_chunk_that_is_not_here_is_refused(chunk: int) -> None:
    d = driver()
    for answer in (
        d.push(chunk, 0, 0, bytes(16)),
        d.push_pull(chunk, 0, 0, bytes(16)),
        d.pull(chunk),
        d.init(chunk, bytes(16)),
    ):
        code, reason = refusal(answer)
        assert code == Refusal.MALFORMED
        assert str(chunk) in reason


def test_a_chunk_of_another_shard_is_refused() -> None:
    d = ShardDriver(model(tensor("w", 8)), shards=2, shard=1)
    assert [c.index for c in d.chunks] == [1]
    assert refusal(d.push(0, 0, 0, bytes(16)))[0] == Refusal.MALFORMED


@pytest.mark.parametrize(
    "hyper",
    [
        b"\xc1",
        wire.pack([1]),
        wire.pack(3),
        wire.pack({"lr": "fast"}),
        wire.pack({"lr": math.nan}),
        wire.pack({"lr": None}),
        wire.pack({"maximize": 3}),
    ],
)
def test_options_that_make_no_sense_are_refused_and_change_nothing(hyper: bytes) -> None:
    d = driver()
    assert refusal(d.push(0, 0, 0, ones(1, 0, 0, 0), hyper=hyper))[0] == Refusal.MALFORMED
    assert d.weights().tolist() == [0, 0, 0, 0]
    d.push(0, 0, 0, ones(1, 0, 0, 0))
    assert d.weights().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("seq", "samples"), [(-1, 1), (0, -1)])
@pytest.mark.parametrize("fetch", [False, True])
def test_counts_below_zero_are_refused(seq: int, samples: int, fetch: bool) -> None:
    """The wire lets -1 through for the fields that may be -1; these may not."""
    d = driver()
    push = d.pushed(0, 0, seq, ones(1, 0, 0, 0), fetch, samples=samples)
    assert refusal(d.send(push))[0] == Refusal.MALFORMED
    assert d.weights().tolist() == [0, 0, 0, 0]


def test_frozen_tensors_are_sent_once_and_never_pushed() -> None:
    d = ShardDriver(model(tensor("table", 2, kind="frozen")))
    d.init(0, ones(1, 2))
    assert refusal(d.push(0, 1, 0, ones(5, 5)))[0] == Refusal.MALFORMED
    assert values_of(d.pull(0)) == [1, 2]


def test_a_contribution_older_than_the_window_is_refused() -> None:
    d = driver()
    for seq in range(70):
        d.push(0, 0, seq, ones(0, 0, 0, 1))
    assert isinstance(d.push(0, 0, 6, ones(1, 0, 0, 0)), m.Ack), "a repeat is answered"
    assert refusal(d.push(0, 0, 5, ones(1, 0, 0, 0)))[0] == Refusal.STALE_SEQ
    assert d.weights().tolist() == [0, 0, 0, 70]


def test_refusals_and_repeats_are_counted() -> None:
    d = driver()
    d.push(0, 0, 0, ones(1, 0, 0, 0))
    d.push(0, 0, 0, ones(1, 0, 0, 0))
    d.push(0, 0, 1, bytes(3))
    document = d.shard.stats.document()
    assert (document["applied"], document["repeats"], document["refused"]) == (1, 1, 1)


# ---------------------------------------------------------------- exactly once

WORKERS, STEPS = 3, 5
deliveries = st.lists(st.tuples(st.integers(0, WORKERS - 1), st.integers(0, STEPS - 1), st.booleans()), max_size=40)


def _ledger(mode: str, chunk_bytes: int) -> ShardDriver:
    """A place for every contribution, over several chunks."""
    d = ShardDriver(model(tensor("w", WORKERS * STEPS, dtype="float64")), mode, WORKERS, chunk_bytes=chunk_bytes)
    d.init_all()
    return d


def _one_hot(slot: int, seq: int) -> torch.Tensor:
    gradient = torch.zeros(WORKERS * STEPS, dtype=torch.float64)
    gradient[slot * STEPS + seq] = 1
    return gradient


def _deliver(d: ShardDriver, slot: int, seq: int, fetch: bool) -> None:
    for chunk, part in d.slices(_one_hot(slot, seq)):
        d.send(d.pushed(chunk, slot, seq, part, fetch))


@pytest.mark.parametrize("mode", ["async", "ssp:0", "ssp:2"])
def test_whatever_is_repeated_or_reordered_is_applied_once(mode: str) -> None:
    @given(deliveries, st.sampled_from([8, 40, 1 << 20]))
    def deliver(arrivals: list[tuple[int, int, bool]], chunk_bytes: int) -> None:
        d = _ledger(mode, chunk_bytes)
        for slot, seq, fetch in arrivals:
            _deliver(d, slot, seq, fetch)
        expected = torch.zeros(WORKERS * STEPS, dtype=torch.float64)
        for slot, seq, _ in arrivals:
            expected[slot * STEPS + seq] = 1
        assert d.vector().tolist() == expected.tolist()

    deliver()


@given(deliveries, st.sampled_from([8, 40, 1 << 20]))
def test_sync_applies_every_contribution_once_in_its_round(
    repeats: list[tuple[int, int, bool]], chunk_bytes: int
) -> None:
    """Each slot's contributions come in order, with repeats of what it sent before in between."""
    d = _ledger("sync", chunk_bytes)
    sent = [0] * WORKERS
    for slot, seq, fetch in [*repeats, *[(s, STEPS, False) for _ in range(STEPS) for s in range(WORKERS)]]:
        if seq < sent[slot]:
            _deliver(d, slot, seq, fetch)
        elif sent[slot] < STEPS:
            _deliver(d, slot, sent[slot], fetch)
            sent[slot] += 1
    assert torch.allclose(d.vector(), torch.full((WORKERS * STEPS,), 1 / WORKERS, dtype=torch.float64))
    assert {d.shard.chunks[c.index].version for c in d.chunks} == {STEPS}


def test_a_repeat_is_answered_from_the_present_state() -> None:
    d = driver()
    assert values_of(d.push_pull(0, 0, 0, ones(1, 0, 0, 0))) == [1, 0, 0, 0]
    d.push(0, 1, 0, ones(0, 1, 0, 0))
    assert values_of(d.push_pull(0, 0, 0, ones(1, 0, 0, 0))) == [1, 1, 0, 0]


def test_a_repeat_waits_as_the_original_does() -> None:
    d = driver("sync")
    first = d.pushed(0, 0, 0, ones(1, 0, 0, 0))
    again = replace(first, request=d.number())
    assert d.send(first) is None
    assert d.send(again) is None, "the round is still open"
    d.push(0, 1, 0, ones(0, 1, 0, 0))
    assert values_of(d.answers[first.request]) == values_of(d.answers[again.request]) == [0.5, 0.5, 0, 0]
    assert values_of(d.push_pull(0, 0, 0, ones(1, 0, 0, 0))) == [0.5, 0.5, 0, 0], "the round is over"


def test_a_push_is_answered_with_the_chunks_version() -> None:
    d = driver()
    versions = [d.push(0, slot, 0, ones(0, 0, 0, 0)) for slot in (0, 1)]
    assert [v.version for v in versions if isinstance(v, m.Ack)] == [1, 2]


# ---------------------------------------------------------------- modes


def test_async_answers_with_what_is_there() -> None:
    d = driver()
    d.push(0, 1, 0, ones(0, 1, 0, 0))
    answer = d.push_pull(0, 0, 0, ones(1, 0, 0, 0))
    assert isinstance(answer, m.Weights)
    assert (answer.chunk, answer.version, values_of(answer)) == (0, 2, [1, 1, 0, 0])


def test_staleness_is_what_happened_since_the_base_version() -> None:
    d = driver()
    d.push(0, 0, 0, ones(1, 0, 0, 0), base_version=0)
    d.push(0, 0, 1, ones(1, 0, 0, 0), base_version=1)
    d.push(0, 1, 0, ones(1, 0, 0, 0), base_version=0)
    assert d.shard.stats.staleness == {0: 2, 2: 1}


def test_ssp_applies_on_arrival_and_holds_the_fast_back() -> None:
    d = driver("ssp:1")
    assert values_of(d.push_pull(0, 0, 0, ones(1, 0, 0, 0))) == [1, 0, 0, 0]
    held = d.pushed(0, 0, 1, ones(1, 0, 0, 0))
    assert d.send(held) is None
    assert d.weights().tolist() == [2, 0, 0, 0], "applied all the same"
    assert values_of(d.pull(0, slot=0)) == [2, 0, 0, 0], "a plain pull waits for nobody"
    d.push_pull(0, 1, 0, ones(0, 1, 0, 0))
    assert values_of(d.answers[held.request]) == [2, 1, 0, 0]
    assert d.shard.stats.clock_gap_max == 1


def test_sync_averages_by_samples_in_slot_order() -> None:
    d = driver("sync")
    late = d.pushed(0, 1, 0, ones(0, 8, 0, 0), samples=1)
    assert d.send(late) is None
    answer = d.push_pull(0, 0, 0, ones(8, 0, 0, 0), samples=3)
    assert values_of(answer) == [6, 2, 0, 0]
    assert values_of(d.answers[late.request]) == [6, 2, 0, 0]


def test_sync_gives_the_same_bits_whatever_the_order_of_arrival() -> None:
    gradients = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-4, 1.0, 1e4, 1.0])
    found = set()
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)):
        d = driver("sync", 3)
        for slot in order:
            d.push(0, slot, 0, gradients[slot], samples=slot + 1)
        found.add(bytes(d.shard.chunks[0].payload()))
    assert len(found) == 1


def test_options_in_force_travel_with_each_push() -> None:
    d = driver()
    d.push(0, 0, 0, ones(1, 0, 0, 0), hyper=wire.pack({"lr": 2.0}))
    d.push(0, 0, 1, ones(0, 1, 0, 0))
    d.push(0, 0, 2, ones(0, 0, 1, 0), hyper=wire.pack({"lr": 0.5}))
    assert d.weights().tolist() == [2, 2, 0.5, 0]


def test_buffers_are_the_mean_of_what_each_worker_said_last() -> None:
    spec = model(tensor("mean", 2, kind="buffer"), tensor("count", 1, dtype="int64", kind="buffer"))
    d = ShardDriver(spec, "async", 3)
    d.init_all()
    mean, count = sorted((c.index for c in d.chunks), key=lambda i: d.layout.chunks[i].dtype == "int64")
    for slot, seq, value in ((0, 0, 6.0), (1, 0, 2.0), (0, 1, 4.0)):
        d.push(mean, slot, seq, ones(value, -value), samples=int(value))
        d.push(count, slot, seq, torch.tensor([int(value) + slot]))
    assert d.weights(mean).tolist() == [3, -3]
    assert d.weights(count).tolist() == [4], "integers are the lowest slot's"


def test_buffers_of_a_round_are_averaged_by_workers_not_by_samples() -> None:
    d = ShardDriver(model(tensor("mean", 1, kind="buffer")), "sync", 2)
    d.init_all()
    for slot, samples in ((0, 9), (1, 1)):
        d.push(0, slot, 0, ones(float(slot)), samples=samples)
    assert d.weights().tolist() == [0.5]


# ---------------------------------------------------------------- ends of epochs


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_an_epoch_is_answered_when_all_have_ended(mode: str) -> None:
    d = driver(mode, 3)
    requests = [d.end_epoch(slot) for slot in (2, 0)]
    assert not any(r in d.answers for r in requests)
    requests.append(d.end_epoch(1))
    assert all(isinstance(d.answers[r], m.Ack) for r in requests)
    again = [d.end_epoch(slot) for slot in (0, 1)]
    assert not any(r in d.answers for r in again), "the next epoch is open again"


def test_the_end_of_an_epoch_is_answered_when_the_rest_leaves() -> None:
    d = driver("sync", 3)
    requests = [d.end_epoch(0), d.end_epoch(1)]
    d.leave(2)
    assert all(isinstance(d.answers[r], m.Ack) for r in requests)


def test_a_round_goes_on_without_who_has_ended_until_the_next_epoch() -> None:
    d = driver("sync")
    d.end_epoch(1)
    assert values_of(d.push_pull(0, 0, 0, ones(1, 0, 0, 0))) == [1, 0, 0, 0]
    d.end_epoch(0)
    assert d.push_pull(0, 0, 1, ones(1, 0, 0, 0)) is None, "worker 1 is awaited again"


def test_a_leaver_lets_the_open_round_go() -> None:
    d = driver("sync", 3)
    held = [d.pushed(0, slot, 0, ones(1, 0, 0, 0)) for slot in (0, 2)]
    assert [d.send(h) for h in held] == [None, None]
    d.leave(1)
    assert [values_of(d.answers[h.request]) for h in held] == [[1, 0, 0, 0]] * 2


def test_a_leaver_lets_ssp_go_on() -> None:
    d = driver("ssp:0")
    held = d.pushed(0, 0, 0, ones(1, 0, 0, 0))
    assert d.send(held) is None
    d.leave(1)
    assert values_of(d.answers[held.request]) == [1, 0, 0, 0]


def test_what_the_chief_says_of_its_buffers_counts_at_the_end_of_the_epoch() -> None:
    """buffers=chief: only worker 0 pushes them, then all end the epoch and pull."""
    d = ShardDriver(model(tensor("mean", 1, kind="buffer"), buffers="chief"), "sync", 3)
    d.init_all()
    d.push(0, 0, 0, ones(7))
    for slot in (0, 1, 2):
        d.end_epoch(slot)
    assert values_of(d.pull(0, slot=2)) == [7]


def _recorded(stored: StoredChunk) -> list[list[tuple[int, int]]]:
    """The rounds that the chunk will be told to apply, as (slot, seq)."""
    rounds: list[list[tuple[int, int]]] = []
    apply: Callable[[list[Contribution]], None] = stored.apply

    def recording(round_: list[Contribution]) -> None:
        rounds.append([(c.slot, c.seq) for c in round_])
        apply(round_)

    stored.apply = recording  # type: ignore[method-assign]
    return rounds


@given(
    counts=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=3),
    schedule=st.lists(st.integers(0, 2), max_size=60),
)
def test_sync_rounds_follow_from_what_workers_do_never_from_timing(
    counts: list[list[int]], schedule: list[int]
) -> None:
    """Epoch by epoch, slot s pushes ``counts[epoch][s]`` times, ends, and goes on when all have ended.

    Whatever the interleaving, the k-th round of an epoch holds the k-th contributions of all who have one.
    """
    d = driver("sync", 3)
    found = _recorded(d.shard.chunks[0])
    epochs, sent, seqs = [0] * 3, [0] * 3, [0] * 3
    ending: dict[int, int] = {}
    queue = deque([*schedule, *[0, 1, 2] * (12 * len(counts))])
    while queue:
        slot = queue.popleft()
        if slot in ending or epochs[slot] == len(counts):
            continue
        if sent[slot] < counts[epochs[slot]][slot]:
            d.push(0, slot, seqs[slot], ones(1, 0, 0, 0))
            sent[slot] += 1
            seqs[slot] += 1
            continue
        ending[slot] = d.end_epoch(slot)
        assert (ending[slot] in d.answers) == (len(ending) == 3)
        if len(ending) == 3:
            epochs, sent, ending = [e + 1 for e in epochs], [0] * 3, {}
    assert epochs == [len(counts)] * 3, "the schedule was too short"

    expected, at = [], [0] * 3
    for row in counts:
        for index in range(max(row)):
            expected.append([(slot, at[slot] + index) for slot in range(3) if index < row[slot]])
        at = [a + n for a, n in zip(at, row, strict=True)]
    assert found == expected


# ---------------------------------------------------------------- deadlines


@pytest.mark.parametrize(
    ("mode", "before", "missing"),
    [
        ("sync", (0, 2), "worker/1, worker/3"),
        ("ssp:0", (0, 2), "worker/1, worker/3"),
        ("sync", (3,), "worker/0, worker/1, worker/2"),
    ],
)
def test_an_overdue_fetch_is_refused_naming_who_is_missing(mode: str, before: Iterable[int], missing: str) -> None:
    d = driver(mode, 4)
    for slot in before:
        assert d.push_pull(0, slot, 0, ones(1, 0, 0, 0)) is None
    assert d.tick(10.0) == [], "the deadline is not over"
    refused = [refusal(answer) for answer in d.tick(10.1)]
    assert len(refused) == len(list(before))
    for code, reason in refused:
        assert code == Refusal.TIMED_OUT
        assert reason.endswith(f"still waiting for {missing}")
        assert "10 s" in reason
    assert d.tick(30.0) == [], "refused once"


def test_the_deadline_counts_from_each_fetch() -> None:
    d = driver("sync", 3)
    d.push_pull(0, 0, 0, ones(1, 0, 0, 0))
    d.now_s = 6.0
    late = d.pushed(0, 1, 0, ones(1, 0, 0, 0))
    d.send(late)
    assert len(d.tick(11.0)) == 1
    assert late.request not in d.answers
    d.push(0, 2, 0, ones(1, 0, 0, 0))
    assert isinstance(d.answers[late.request], m.Weights)


def test_the_contribution_of_an_overdue_fetch_still_counts_once() -> None:
    d = driver("sync")
    d.push_pull(0, 0, 0, ones(2, 0, 0, 0))
    d.tick(11.0)
    assert values_of(d.push_pull(0, 1, 0, ones(0, 2, 0, 0))) == [1, 1, 0, 0]
    assert values_of(d.push_pull(0, 0, 0, ones(2, 0, 0, 0))) == [1, 1, 0, 0]


# ---------------------------------------------------------------- snapshots

TWO_CHUNKS = model(tensor("w", 4), tensor("mean", 1, kind="buffer"))


def _two_chunks(mode: str) -> ShardDriver:
    """Trainable chunks 0 and 1 of two elements each, and a buffer in chunk 2."""
    d = ShardDriver(TWO_CHUNKS, mode, 2, chunk_bytes=8)
    assert [(c.kind, c.numel) for c in d.chunks] == [("trainable", 2), ("trainable", 2), ("buffer", 1)]
    d.init_all()
    return d


def test_a_snapshot_now_holds_what_is_there() -> None:
    d = _two_chunks("async")
    d.push(0, 0, 0, ones(1, 2), position=(0, 32))
    d.push(2, 0, 0, ones(5))
    d.snapshot(4)
    d.push(0, 0, 1, ones(1, 1), position=(0, 64))
    written = d.written.pop()
    assert (written.error, written.snapshot, written.shard, written.folder) == ("", 4, 0, "folder")
    assert {k: v.tolist() for k, v in written.tensors.items()} == {
        "0.weights": [1, 2],
        "1.weights": [0, 0],
        "2.weights": [5],
    }
    assert written.document["trainable_versions"] == [0, 1]
    assert written.document["position"] == [0, 32]
    assert {k: row["version"] for k, row in written.document["chunks"].items()} == {"0": 1, "1": 0, "2": 1}


def test_a_snapshot_holds_the_rules_state_and_the_window_of_repeats() -> None:
    d = ShardDriver(model(tensor("w", 2), rule="Adam", options=({"lr": 0.1},)))
    d.init_all()
    for seq in (0, 1, 3):
        d.push(0, 1, seq, ones(1, 2), worker_epoch=2)
    d.snapshot()
    written = d.written.pop()
    assert set(written.tensors) == {"0.weights", "0.exp_avg", "0.exp_avg_sq"}
    row = written.document["chunks"]["0"]
    assert row["scalars"] == {"step": 3.0}
    assert row["windows"] == [[1, 2, 2, [3]]]


def test_a_snapshot_at_a_clock_takes_each_chunk_when_it_gets_there() -> None:
    d = _two_chunks("sync")
    d.snapshot(1, at_clock=1)
    assert d.written == []
    for seq in (0, 1):
        for slot in (0, 1):
            d.push(0, slot, seq, ones(1, 1), position=(0, 8 * (seq + 1)))
    assert d.written == [], "chunk 1 is not there yet"
    for slot in (0, 1):
        d.push(1, slot, 0, ones(3, 3), position=(0, 8))
    written = d.written.pop()
    assert written.error == ""
    assert written.tensors["0.weights"].tolist() == [1, 1], "chunk 0 as it was at clock 1, though it has gone on"
    assert written.tensors["1.weights"].tolist() == [3, 3]
    assert written.document["trainable_versions"] == [1]
    d.push(1, 0, 1, ones(1, 1))
    assert d.written == [], "written once"


def test_a_snapshot_at_the_present_clock_is_taken_at_once() -> None:
    d = _two_chunks("sync")
    for chunk in (0, 1):
        for slot in (0, 1):
            d.push(chunk, slot, 0, ones(1, 1))
    d.snapshot(1, at_clock=1)
    assert d.written.pop().document["trainable_versions"] == [1]


def test_a_snapshot_at_a_clock_that_is_over_fails_and_says_so() -> None:
    d = _two_chunks("sync")
    for seq in (0, 1):
        for slot in (0, 1):
            d.push(0, slot, seq, ones(1, 1))
    d.snapshot(1, at_clock=1)
    written = d.written.pop()
    assert "clock 2" in written.error
    assert written.tensors == {}
    d.snapshot(2, at_clock=-1)
    assert d.written.pop().error == "", "the next one works"


def test_a_snapshot_that_was_not_complete_fails_when_the_next_begins() -> None:
    d = _two_chunks("sync")
    d.snapshot(1, at_clock=10)
    d.snapshot(2, at_clock=-1)
    first, second = d.written
    assert (first.snapshot, bool(first.error)) == (1, True)
    assert (second.snapshot, second.error) == (2, "")


def test_a_shard_without_chunks_answers_a_snapshot_at_once() -> None:
    d = ShardDriver(model(tensor("w", 1)), "sync", shards=2, shard=0)
    assert d.chunks == ()
    d.snapshot(1, at_clock=10)
    assert (d.written[0].error, d.written[0].tensors) == ("", {})


def test_a_snapshot_before_the_first_weights_holds_no_zeros() -> None:
    """Committed, it would let a job resume from weights that nobody ever had."""
    d = driver(initialise=False)
    d.snapshot()
    assert all(written.error for written in d.written)
    d.init(0, ones(1, 2, 3, 4))
    assert all(w.error or w.tensors["0.weights"].tolist() == [1, 2, 3, 4] for w in d.written)


# ---------------------------------------------------------------- nobody sees a torn chunk


def test_weights_under_way_keep_their_bytes() -> None:
    d = driver()
    d.init_all()
    sent = d.sent = FakeSent()
    asked = m.Pull(d.number(), JOB, 0, 0, 0)
    d.send(asked)
    view = d.views[asked.request]
    before = bytes(view)
    for seq in range(3):
        d.push(0, 1, seq, ones(1, 1, 1, 1))
    assert bytes(view) == before, "the transport still reads the old memory"
    assert d.weights().tolist() == [3, 3, 3, 3]
    sent.done = True
    d.push(0, 1, 3, ones(1, 1, 1, 1))
    assert d.weights().tolist() == [4, 4, 4, 4]


def test_weights_are_copied_once_for_many_readers_and_not_at_all_without() -> None:
    d = driver()
    stored = d.shard.chunks[0]
    d.push(0, 1, 0, ones(1, 1, 1, 1))
    home = stored.weights.data_ptr()
    d.push(0, 1, 1, ones(1, 1, 1, 1))
    assert stored.weights.data_ptr() == home, "nobody reads: no copy"
    d.sent = FakeSent()
    for _ in range(3):
        d.pull(0)
    kept = [d.views[r] for r in d.views]
    d.push(0, 1, 2, ones(1, 1, 1, 1))
    moved = stored.weights.data_ptr()
    assert moved != home
    d.push(0, 1, 3, ones(1, 1, 1, 1))
    assert stored.weights.data_ptr() == moved
    assert {bytes(view) for view in kept} == {bytes(ones(2, 2, 2, 2).numpy().tobytes())}


def test_a_slow_reader_is_not_forgotten_when_a_fast_one_has_finished() -> None:
    d = driver()
    slow, fast = FakeSent(), FakeSent()
    for sent in (slow, fast):
        d.sent = sent
        d.pull(0)
    view = next(iter(d.views.values()))
    fast.done = True
    d.push(0, 1, 0, ones(1, 1, 1, 1))
    assert bytes(view) == bytes(16), "the slow one still reads the old memory"


def test_the_rules_state_follows_weights_that_were_copied() -> None:
    """With momentum, so that a rule that stayed with the old memory would be noticed."""
    spec = model(tensor("w", 2), options=({**ADD[0], "momentum": 0.5},))
    d = ShardDriver(spec)
    d.init_all()
    d.push(0, 0, 0, ones(4, 0))
    d.sent = FakeSent()
    asked = m.Pull(d.number(), JOB, 0, 0, 0)
    d.send(asked)
    d.push(0, 0, 1, ones(0, 4))
    assert d.weights().tolist() == [6, 4]
    assert bytes(d.views[asked.request]) == ones(4, 0).numpy().tobytes()


def test_a_snapshot_says_the_data_position_of_what_was_applied_not_of_what_waits() -> None:
    d = driver("sync")
    d.init_all()
    for slot in (0, 1):
        d.push(0, slot, 0, ones(1, 0, 0, 0), position=(0, 10))
    d.push(0, 0, 1, ones(1, 0, 0, 0), position=(0, 20))
    d.snapshot()
    assert d.written[-1].document["position"] == [0, 10]
