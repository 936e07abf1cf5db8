"""A leader and its follower: whatever was answered is at the follower, whoever dies when; nothing counts twice; what a
replaced leader believes does not matter."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from replica_sim import run_seed
from unit_kit import ADD, JOB, ShardDriver, model, payload, tensor

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import plan
from downpour_common.modes import parse_mode
from downpour_server.effects import Effect, Reply, SendKept, Tell
from downpour_server.replica import Follower, Leader
from downpour_server.shard import Identity, Shard
from downpour_server.snapshot import Reading
from downpour_server.state import STATE, Image, Received, attributes
from downpour_server.stats import ShardStats

MODEL = model(tensor("w", 4), tensor("b", 3, kind="buffer"))
LAYOUT = plan(MODEL, 1, 1024)
ONES = torch.ones(4)


def make(term: int, mode: str = "async") -> Shard:
    """A shard of two workers; chunk 0 can be trained, chunk 1 is a buffer."""
    return Shard(Identity(JOB, 0, term), LAYOUT, parse_mode(mode), 2, 10.0, keep_previous=mode == "sync")


class Pair:
    """A leader in term 1, a follower, and what each was sent."""

    def __init__(self, mode: str = "async") -> None:
        self.leader = Leader(make(1, mode), 1)
        self.follower = Follower(lambda term: make(term, mode), 5, 0)
        self.items: deque[m.Message] = deque()
        self.answers: list[m.Message] = []
        self.requests = 0
        self.follower.follow(1)

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(_, m.Item() as item):
                    self.items.append(item)
                case Reply(_, message) | Tell(message) | SendKept(_, message):
                    self.answers.append(message)
                case _:
                    pass

    def take(self, message: Any) -> None:
        """The leader takes an input."""
        self.carry_out(self.leader.pass_on(message))
        self.carry_out(self.leader.hold(self.leader.shard.handle(b"worker", message, 0.0)))

    def push(self, seq: int, slot: int = 0, kind: Any = m.Push) -> None:
        self.requests += 1
        self.take(kind(self.requests, JOB, 1, slot, 0, seq, 0, 0, 1, (0, seq), b"", payload(ONES)))

    def begin(self) -> None:
        """First weights."""
        for chunk in LAYOUT.chunks:
            self.requests += 1
            self.take(m.Init(self.requests, JOB, 0, 0, chunk.index, payload(torch.zeros(chunk.numel))))
        self.answers.clear()

    def attach(self) -> None:
        """The follower begins, and gets all there is."""
        self.carry_out(self.leader.set_backup(m.SetBackup(1, 5, 0)))
        self.hear(self.follower.say())
        self.settle()

    def hear(self, *messages: m.Message) -> None:
        for message in messages:
            assert isinstance(message, m.Replicated)
            self.carry_out(self.leader.replicated(b"follower", message))

    def settle(self) -> None:
        """Deliver until nothing is under way."""
        while self.items:
            self.hear(*self.follower.receive([self.items.popleft()]))
        self.follower.apply()


@pytest.fixture
def pair() -> Pair:
    """With a follower that holds everything."""
    made = Pair()
    made.begin()
    made.attach()
    assert made.follower.complete
    return made


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    "seeds",
    [pytest.param(range(at, at + 30), marks=() if at < 60 else pytest.mark.long) for at in range(0, 300, 30)],
    ids=str,
)
def test_nothing_answered_is_lost_and_nothing_counts_twice(seeds: range) -> None:
    """Leaders die or freeze at any point, followers die, connections break; see ``replica_sim``."""
    for seed in seeds:
        run_seed(seed)


# ---------------------------------------------------------------- answers


def test_alone_a_leader_answers_at_once() -> None:
    pair = Pair()
    pair.begin()
    pair.push(0)
    assert [type(x) for x in pair.answers] == [m.Ack]
    assert pair.leader.alone


def test_an_answer_waits_for_the_follower(pair: Pair) -> None:
    pair.push(0)
    assert not pair.answers
    assert len(pair.items) == 1
    pair.settle()
    assert [type(x) for x in pair.answers] == [m.Ack]
    assert torch.equal(pair.follower.shard.chunks[0].weights, ONES)


def test_what_was_seen_of_a_state_waits_too(pair: Pair) -> None:
    """A pull changes nothing, but its answer shows what may be lost."""
    pair.push(0)
    pair.take(m.Pull(100, JOB, 1, 0, 0))
    assert not pair.answers
    pair.settle()
    assert [type(x) for x in pair.answers] == [m.Ack, m.Weights]


def test_weights_that_wait_are_those_of_their_version(pair: Pair) -> None:
    pair.push(0, kind=m.PushPull)
    pair.push(1)
    pair.settle()
    weights = pair.answers[0]
    assert isinstance(weights, m.Weights)
    assert weights.version == 1
    assert torch.equal(torch.frombuffer(bytearray(weights.payload), dtype=torch.float32), ONES)


def test_only_the_coordinator_lets_a_leader_go_on_alone(pair: Pair) -> None:
    pair.push(0)
    pair.carry_out(pair.leader.set_backup(m.SetBackup(0, -1, -1)))
    assert not pair.answers, "an order of another term"
    pair.carry_out(pair.leader.set_backup(m.SetBackup(1, -1, -1)))
    assert len(pair.answers) == 1
    assert pair.leader.alone


def test_the_members_that_are_reported_are_known_to_the_follower(pair: Pair) -> None:
    message = m.SetMembers(7, (0, 0, 1, 0))
    pair.carry_out(pair.leader.pass_on(message))
    effects = pair.leader.shard.set_members(7, {0: 0, 1: 0})
    pair.carry_out(pair.leader.hold([*effects, Tell(m.MembersSet(JOB, 0, 0, 7))]))
    assert (pair.leader.members_version, pair.answers) == (0, [])
    pair.settle()
    assert pair.leader.members_version == pair.follower.shard.members_version == 7
    assert [type(x) for x in pair.answers] == [m.MembersSet]


# ---------------------------------------------------------------- the stream


def test_lost_items_are_sent_again(pair: Pair) -> None:
    pair.push(0)
    pair.push(1)
    pair.items.popleft()
    pair.settle()
    assert len(pair.answers) == 2


def test_the_last_item_is_sent_again_when_the_follower_says_twice_that_it_lacks_it(pair: Pair) -> None:
    pair.push(0)
    pair.items.clear()
    pair.hear(pair.follower.say())
    assert not pair.items, "it may be on its way"
    pair.hear(pair.follower.say())
    pair.settle()
    assert len(pair.answers) == 1


def test_a_stranger_is_no_follower(pair: Pair) -> None:
    pair.push(0)
    for wrong in ({"job": "other"}, {"term": 2}, {"process": 6}, {"epoch": 1}, {"shard": 1}):
        pair.hear(replace(pair.follower.say(), number=1 << 40, **wrong))
    assert not pair.answers


def test_inputs_that_come_during_the_transfer_follow_it() -> None:
    pair = Pair()
    pair.begin()
    pair.carry_out(pair.leader.set_backup(m.SetBackup(1, 5, 0)))
    pair.hear(pair.follower.say())
    pair.push(0)
    assert [type(x) for x in pair.answers] == [m.Ack], "until it is complete, the leader answers alone"
    pair.settle()
    assert pair.follower.complete
    assert torch.equal(pair.follower.shard.chunks[0].weights, ONES)


# ---------------------------------------------------------------- promotion and fencing


def test_a_follower_that_lacks_something_is_not_promoted() -> None:
    pair = Pair()
    assert pair.follower.promote(2) == "it does not hold all that has been answered"


def test_the_promoted_one_knows_what_it_has_and_takes_the_rest(pair: Pair) -> None:
    pair.push(0)
    pair.settle()
    assert pair.follower.promote(2) == ""
    new = pair.follower.shard
    for seq in (0, 1):
        push = m.Push(seq + 1, JOB, 2, 0, 0, seq, 0, 0, 1, (0, seq), b"", payload(ONES))
        [answer] = new.handle(b"worker", push, 0.0)
        assert isinstance(answer, Reply)
        assert isinstance(answer.message, m.Ack)
    assert torch.equal(new.chunks[0].weights, 2 * ONES)
    assert pair.follower.promote(2) == "term 2 is not above 2"


def test_a_leader_that_was_replaced_gets_no_acknowledgement(pair: Pair) -> None:
    assert pair.follower.promote(2) == ""
    pair.push(0)
    [answer] = pair.follower.receive(pair.items)
    assert answer == m.Fenced(JOB, 0, 2)
    assert torch.equal(pair.follower.shard.chunks[0].weights, 0 * ONES)
    pair.leader.fence(answer)
    pair.push(1)
    assert pair.leader.fenced
    assert not pair.answers


# ---------------------------------------------------------------- the state


@pytest.mark.parametrize("mode", ["async", "ssp:1", "sync"])
def test_every_attribute_of_a_shard_is_accounted_for(mode: str) -> None:
    """Whoever adds one decides in ``state.STATE`` whether a follower needs it."""
    shard = make(1, mode)
    parts = [shard, shard._members, shard.stats, shard._passes, shard._trail]
    parts += [shard._captures, shard._settling, shard._updates, shard._fetches, shard._endings, shard._refusals]
    parts += [shard._epochs, shard._greeting, shard._contributions]
    parts += [*shard.chunks.values(), *shard._gates.values()]
    for part in parts:
        if part is not None:
            known = STATE[type(part)]
            assert attributes(part) == known.carried | known.apart | known.own, type(part).__name__
            assert len(attributes(part)) == len(known.carried) + len(known.apart) + len(known.own)


@pytest.mark.parametrize("rule", ["SGD", "Adam", "NAdam"])
@pytest.mark.parametrize("mode", ["async", "ssp:1", "sync"])
def test_a_copy_goes_on_bit_for_bit(mode: str, rule: str) -> None:
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.1}, "NAdam": {"lr": 0.1}}[rule]
    spec = model(tensor("w", 500), tensor("b", 3, kind="buffer"), rule=rule, options=(options,))
    first, second = ShardDriver(spec, mode, chunk_bytes=1024), ShardDriver(spec, mode, chunk_bytes=1024)
    first.init_all(0.5)

    def push(driver: ShardDriver, seq: int, slot: int) -> None:
        for chunk in driver.chunks:
            gradient = torch.sin(torch.arange(chunk.numel) * (seq + slot + 1.0))
            driver.push(chunk.index, slot, seq, gradient, position=(0, seq))

    for seq in range(3):
        push(first, seq, 0)
        push(first, seq, 1)
    push(first, 3, 0)
    image, received = Image(first.shard, Reading()), Received()
    parts = [bytes(part) for part, _ in image.parts()]
    assert sum(map(len, parts)) == image.nbytes
    for part in parts:
        received.take(part)
    received.load(second.shard)
    for driver in (first, second):
        push(driver, 3, 1)
        push(driver, 4, 0)
        push(driver, 4, 1)
        push(driver, 4, 1)
        driver.shard.stats = ShardStats()
    assert torch.equal(first.vector(), second.vector())
    images = [Image(driver.shard, Reading()) for driver in (first, second)]
    assert images[0]._head == images[1]._head
    assert all(map(torch.equal, images[0]._tensors, images[1]._tensors))


def test_what_is_taken_stays_as_it_was_while_the_training_goes_on() -> None:
    driver = ShardDriver(model(tensor("w", 4), options=ADD))
    driver.init_all()
    driver.push(0, 0, 0, ONES)
    image, received, copy = Image(driver.shard, Reading()), Received(), ShardDriver(model(tensor("w", 4), options=ADD))
    driver.push(0, 0, 1, ONES)
    for part, _ in image.parts():
        received.take(part)
    received.load(copy.shard)
    assert torch.equal(copy.weights(), ONES)


def test_half_a_state_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not complete"):
        Received().load(make(1))
