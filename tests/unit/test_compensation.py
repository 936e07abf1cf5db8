"""Late contributions: every way against numpy, the weights that are kept for it, and what it survives."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from unit_kit import JOB, FakeSent, ShardDriver, model, tensor

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.compensation import CompensationSpec, parse_compensation
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError
from downpour_common.layout import plan
from downpour_common.modes import parse_mode
from downpour_server.compensation import WAYS
from downpour_server.contribution import Contribution
from downpour_server.effects import Attach
from downpour_server.shard import Identity, Shard
from downpour_server.snapshot import Reading
from downpour_server.state import STATE, Image, Received, attributes
from downpour_server.store import StoredChunk

SIZE, LR = 7, 0.1
SPEC = model(tensor("w", SIZE, dtype="float64"), tensor("mean", 2, kind="buffer"), options=({"lr": LR},))
ALL = ["stale-lr", "dc:0.3", "dc-adaptive:0.7", "gap"]


def make_shard(way: str, workers: int = 2, bases: int = 3, mode: str = "async", **others: Any) -> Shard:
    spec, layout = parse_compensation(way), plan(SPEC, 1, 1 << 20)
    identity = Identity(JOB, 0, 5)
    return Shard(identity, layout, parse_mode(mode), workers, 10.0, compensation=spec, bases=bases, **others)


def make_driver(way: str, **others: Any) -> ShardDriver:
    driver = ShardDriver(SPEC, workers=others.get("workers", 2))
    driver.shard = make_shard(way, **others)
    driver.init(0, torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    driver.init(1, torch.zeros(2))
    return driver


class Reference:
    """The same arithmetic over whole histories."""

    def __init__(self, way: str) -> None:
        self.spec = parse_compensation(way)
        self.history = [np.linspace(-1, 1, SIZE)]
        self.mean_square = np.zeros(SIZE)
        self.step = np.zeros(SIZE)

    def apply(self, g: np.ndarray, base: int) -> None:
        now, then = self.history[-1], self.history[base]
        staleness, lr = len(self.history) - 1 - base, LR
        match self.spec.name:
            case "stale-lr":
                lr /= max(1, staleness)
            case "dc":
                g = g + self.spec.strength * g * g * (now - then)
            case "dc-adaptive":
                self.mean_square = 0.95 * self.mean_square + 0.05 * g * g
                g = g + self.spec.strength / np.sqrt(self.mean_square + 1e-7) * g * g * (now - then)
            case "gap" if len(self.history) > 1:
                g = g / (np.abs(now - then) / self.step + 1)
        self.history.append(now - lr * g)
        share = max(1 / (len(self.history) - 1), 0.01)
        self.step = self.step + share * (np.abs(self.history[-1] - now) - self.step)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", ALL)
def test_contributions_of_several_workers_are_compensated_as_the_papers_say(way: str, seed: int) -> None:
    """Workers that fetch at once, that compute on older weights, that pull between: whatever they do, in any order."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    delays = {0: 0, 1: 1, 2: 5}
    driver, reference = make_driver(way, workers=3, bases=20), Reference(way)
    held: dict[int, deque[tuple[np.ndarray, int]]] = {slot: deque() for slot in delays}
    fetched, seqs = {}, dict.fromkeys(delays, 0)
    for slot in delays:
        answer = driver.pull(0, slot)
        assert isinstance(answer, m.Weights)
        fetched[slot] = answer.version
    for _ in range(150):
        slot = draw.choice(list(delays))
        if draw.random() < 0.1:
            answer = driver.pull(0, slot)
        else:
            held[slot].append((numbers.normal(size=SIZE), fetched[slot]))
            if len(held[slot]) <= delays[slot]:
                answer = driver.pull(0, slot)
            else:
                gradient, base = held[slot].popleft()
                reference.apply(gradient, base)
                answer = driver.push_pull(0, slot, seqs[slot], torch.from_numpy(gradient), base_version=base)
                seqs[slot] += 1
                np.testing.assert_allclose(driver.shard.chunks[0].weights.numpy(), reference.history[-1], rtol=1e-9)
        assert isinstance(answer, m.Weights)
        fetched[slot] = answer.version
    assert driver.shard.stats.uncompensated == 0
    assert max(driver.shard.stats.staleness) > 5
    bases = driver.shard.chunks[0].bases
    if bases is not None:
        assert all(len(kept) <= 20 for kept in bases.kept.values())


@pytest.mark.parametrize("way", ["dc:0.3", "gap"])
def test_what_is_not_known_is_applied_as_it_is_and_counted(way: str) -> None:
    driver = make_driver(way)
    gradient = torch.ones(SIZE, dtype=torch.float64)
    for seq in range(3):
        driver.push_pull(0, 0, seq, gradient, base_version=seq)
    before = driver.shard.chunks[0].weights.clone()
    driver.push_pull(0, 1, 0, gradient, base_version=1)  # which this slot was never given
    assert torch.equal(driver.shard.chunks[0].weights, before - LR * gradient)
    assert driver.shard.stats.uncompensated == 1
    assert driver.shard.stats.document()["uncompensated"] == 1


def test_weights_are_kept_for_those_who_are_there_and_only_so_many() -> None:
    driver = make_driver("dc")
    bases = driver.shard.chunks[0].bases
    assert bases is not None
    for seq in range(10):
        driver.pull(0, 1)  # an evaluator that never pushes
        driver.push_pull(0, 0, seq, torch.ones(SIZE, dtype=torch.float64), base_version=seq)
    assert [version for version, _ in bases.kept[1]] == [7, 8, 9]
    assert [version for version, _ in bases.kept[0]] == [9, 10]
    driver.leave(1)
    assert set(bases.kept) == {0}
    driver.members(1, (0, 1), (1, 1))  # another process in slot 0
    assert not bases.kept


def test_the_same_weights_are_kept_once_for_all() -> None:
    driver = make_driver("dc")
    for slot in (0, 1):
        driver.pull(0, slot)
    driver.push_pull(0, 0, 0, torch.ones(SIZE, dtype=torch.float64))
    bases = driver.shard.chunks[0].bases
    assert bases is not None
    assert bases.kept[0][0][1] is bases.kept[1][0][1] is not None


def test_nothing_is_copied_for_a_sole_worker_on_the_shards_own_weights() -> None:
    driver = make_driver("dc", workers=1)
    memory = memoryview(bytearray(driver.shard.shared_layout(0).nbytes))
    [effect] = driver.shard.handle(b"", m.AttachMemory(driver.number(), JOB, 0, 0, 1, 1, bytes(16), True), 0.0)
    assert isinstance(effect, Attach)
    driver.shard.attached(effect, memory)
    bases = driver.shard.chunks[0].bases
    assert bases is not None
    for seq in range(4):
        push = m.PushPullShared(driver.number(), JOB, 5, 0, 0, seq, seq, 0, 1, (), b"")
        driver.shard.handle(b"", push, 0.0)
        assert driver.shard.chunks[0].lodging
        if seq:  # before its first answer the weights are not in its memory
            assert not any(weights is not None for _, weights in bases.kept[0])
    assert driver.shard.stats.uncompensated == 0


def test_the_learning_rate_of_adam_is_divided_not_its_gradient() -> None:
    """And one that a scheduler has changed is the one that is divided next."""
    options = {"lr": 0.01, "betas": [0.9, 0.999]}
    [chunk] = plan(model(tensor("w", SIZE), rule="Adam", options=(options,)), 1, 1 << 20).chunks
    stored = StoredChunk(chunk, "Adam", options, compensation=CompensationSpec("stale-lr"))
    weights = torch.nn.Parameter(torch.zeros(SIZE))
    adam = torch.optim.Adam([weights], lr=0.01)
    for step, staleness in enumerate([0, 1, 4, 2, 0, 3]):
        lr = 0.01 if step < 3 else 0.03
        gradient = torch.linspace(-1, 1, SIZE) * (step + 1)
        adam.param_groups[0]["lr"] = lr / max(1, staleness)
        weights.grad = gradient.clone()
        adam.step()
        base = stored.version - staleness
        stored.apply([Contribution(0, step, 1, base, wire.pack({"lr": lr}), gradient)])
    torch.testing.assert_close(stored.weights, weights.detach(), atol=1e-6, rtol=1e-5)


def steps(shards: list[Shard], numbers: np.random.Generator, first: int, count: int) -> None:
    """The same contributions to all; slot 1 is always two updates behind."""
    for seq in range(first, first + count):
        for slot in (0, 1):
            gradient = torch.from_numpy(numbers.normal(size=SIZE))
            base = shards[0].chunks[0].version - 2 * slot
            payload = memoryview(gradient.numpy()).cast("B")
            for shard in shards:
                push = m.PushPull(seq, JOB, 5, slot, 0, seq, max(0, base), 0, 1, (), b"", payload)
                shard.handle(b"", push, 0.0)


@pytest.mark.parametrize("way", ALL)
def test_a_follower_goes_on_bit_for_bit(way: str) -> None:
    numbers, driver = np.random.default_rng(1), make_driver(way)
    leader, follower = driver.shard, make_shard(way)
    for slot in (0, 1):
        driver.pull(0, slot)
    steps([leader], numbers, 0, 5)
    image, received = Image(leader, Reading()), Received()
    for part, _ in image.parts():
        received.take(bytes(part))
    received.load(follower)
    steps([leader, follower], numbers, 5, 8)
    assert torch.equal(leader.chunks[0].weights, follower.chunks[0].weights)
    assert leader.stats.uncompensated == follower.stats.uncompensated
    for part in (leader.chunks[0], leader.chunks[0]._compensator, leader.chunks[0].bases):
        if part is not None:
            known = STATE[type(part)]
            assert attributes(part) == known.carried | known.apart | known.own


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("after", [*ALL, "off"])
def test_a_snapshot_has_what_a_way_knows(way: str, after: str) -> None:
    """And another way than before begins anew, without stumbling over it."""
    driver = make_driver(way)
    steps([driver.shard], np.random.default_rng(2), 0, 6)
    stored = driver.shard.chunks[0]
    tensors, row = stored.capture(FakeSent(True))
    restored = make_shard(after).chunks[0]
    kept = {name: value.clone() for name, value in tensors.items()}
    restored.restore(kept.pop("weights"), {**kept, **row["scalars"]}, row["version"])
    gradient = torch.linspace(0.5, 2, SIZE, dtype=torch.float64)
    for chunk in (stored, restored):
        chunk.given_to(0)
        chunk.apply([Contribution(1, 50, 1, chunk.version, b"", gradient)])
        chunk.apply([Contribution(0, 50, 1, chunk.version - 1, b"", gradient)])
    same = way == after or {way, after} == {"stale-lr", "off"}  # one update late is not divided yet
    assert torch.equal(stored.weights, restored.weights) == same


def test_an_update_while_a_snapshot_is_read_changes_none_of_it() -> None:
    driver = make_driver("dc-adaptive")
    steps([driver.shard], np.random.default_rng(3), 0, 4)
    tensors, _ = driver.shard.chunks[0].capture(FakeSent(False))
    before = {name: value.clone() for name, value in tensors.items()}
    steps([driver.shard], np.random.default_rng(3), 4, 4)
    assert "compensation.mean_square" in before
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def test_all_ways_can_be_named() -> None:
    assert {parse_compensation(way).name for way in ALL} == set(WAYS)
    assert str(parse_compensation("dc")) == "dc:0.04"
    assert str(parse_compensation("dc-adaptive:3")) == "dc-adaptive:3"


@pytest.mark.parametrize(
    ("text", "words"),
    [("dcc", "did you mean 'dc'"), ("gap:2", "takes no number"), ("dc:-1", "above 0"), ("dc:x", "above 0")],
)
def test_what_is_no_way_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_compensation(text)


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("sync", {"compensation": "gap"}, "has none to compensate"),
        ("async;1=sync", {"compensation": "gap"}, "has none to compensate"),
        ("async", {"compensation": "dc", "n_fetch": 5}, "use stale-lr"),
        ("async", {"compensation": "nothing"}, "unknown way"),
        ("sync", {"warm_start": 5}, "wait for each other"),
        ("diloco:5", {"warm_start": 5}, "wait for each other"),
        ("async", {"clip": 1.0, "fetch": "layers"}, "leave one out"),
        ("ssp:1", {"inject_staleness": 2}, "belongs to async"),
        ("async", {"inject_staleness": 2, "fetch_ahead": True}, "fetch_ahead"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(mode: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job_spec(name="j", script="t.py", workers=2, shards=1, mode=mode, settings=settings)


def test_a_rule_without_a_learning_rate_has_none_to_divide() -> None:
    [chunk] = plan(model(tensor("w", SIZE), options=({"momentum": 0.5},)), 1, 1 << 20).chunks
    with pytest.raises(ConfigError, match="has none"):
        StoredChunk(chunk, "SGD", {"momentum": 0.5}, compensation=CompensationSpec("stale-lr"))
