"""A shard that is another process now: what the former one has not answered is said to the new one, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from unit_kit import model, tensor

from downpour.client.core import ClientCore, Submission, Successor, Ticket
from downpour.client.parameters import ParameterClient, PushHeader
from downpour.client.thread import ClientThread
from downpour.context import WorkerContext
from downpour_common import messages as m
from downpour_common.errors import PeerError, PeerRefused, PeerTimeout
from downpour_common.layout import Chunk, plan
from downpour_common.messages import Message, Refusal, Request
from downpour_common.sharing import OfferedMemory

CONTEXT = WorkerContext(
    "j", 3, 2, 4, 2, "coordinator", "async", "cpu", 0, "average", 1, 1, 16, 1 << 20, False, 20.0, 20.0
)
LAYOUT = plan(model(tensor("w", 12), tensor("b", 4, kind="buffer")), 2, 16)
TRAINABLE = LAYOUT.by_kind["trainable"]
OURS = tuple(c for c in TRAINABLE if c.shard == 1)
"""of the shard that moves"""
BYTES = sum(c.nbytes for c in OURS)
OLD = ["first-0", "first-1"]
NEW = "second-1"


class Bytes:
    """Chunks' memory: gradients tell their chunk."""

    def __init__(self) -> None:
        self.arrived: dict[int, bytearray] = {c.index: bytearray(c.nbytes) for c in LAYOUT.chunks}

    def weights(self, chunk: Chunk) -> memoryview:
        return memoryview(self.arrived[chunk.index])

    def gradient(self, chunk: Chunk) -> memoryview:
        return memoryview(bytes([chunk.index]) * chunk.nbytes)

    def digest(self, chunk: Chunk) -> bytes:
        return b""


class Loop:
    """In the thread's place: the core, and nothing between it and the test. ``reply`` answers what is waited for."""

    def __init__(self, window_bytes: int) -> None:
        self.core = ClientCore(window_bytes)
        self.now_s = 0.0
        self.forgotten: list[str] = []
        self.sent: list[tuple[str, Any]] = []
        self.reply: Callable[[str, Any], Request | None] = lambda *_: None
        self._number = 0

    def number(self) -> int:
        self._number += 1
        return self._number

    def name(self, server: str, name: str) -> None:
        self.core.name(server, name)

    def move(self, server: str, find: Callable[[], Successor | None]) -> None:
        successor = find()
        if successor is not None:
            self.forgotten.append(self.core.move(server, successor, self.now_s))
        self.turn()

    def submit(self, submissions: list[Submission]) -> None:
        for submission in submissions:
            submission.ticket.attend = lambda ready, _: self.answer_all(ready)
            self.core.submit(submission, self.now_s)
        self.turn()

    def ask(self, server: str, message: Request, awaited: str, timeout_s: float) -> Request:
        ticket = Ticket(1)
        self.submit([Submission(server, message, ticket, awaited, timeout_s)])
        return ticket.result()

    def ask_all(
        self,
        requests: list[tuple[str, Request]],
        awaited: str,
        timeout_s: float,
        on_answer: Callable[[Request], None] | None = None,
        leave_point: object = None,
    ) -> None:
        ticket = Ticket(len(requests), on_answer)
        self.submit([Submission(server, message, ticket, awaited, timeout_s) for server, message in requests])
        ticket.wait()

    def turn(self) -> None:
        self.sent += self.core.outgoing()

    def answer_all(self, ready: Callable[[], bool]) -> None:
        for address, message in self.take():
            answer = self.reply(address, message)
            if answer is not None:
                self.receive(answer)
        assert ready(), "it waits for ever"

    def receive(self, *answers: Request) -> None:
        for answer in answers:
            self.core.received(answer)
        self.turn()

    def take(self) -> list[tuple[str, Any]]:
        """What has left since this was asked last."""
        self.turn()
        sent, self.sent = self.sent, []
        return sent


class Desk:
    """A worker that has greeted both shards, and where it is with the second one."""

    def __init__(self, context: WorkerContext = CONTEXT, attached: bool = False) -> None:
        self.loop = Loop(context.window_bytes)
        self.memory = Bytes()
        self.client = ParameterClient(cast(ClientThread, self.loop), context, LAYOUT, OLD, self.memory)
        self.loop.reply = welcome
        self.client.hello()
        self.client.begin_at(5)
        if attached:
            self.client.share(OfferedMemory(memoryview(b""), -1, b"nonce"), True)
        self.loop.take()

    def push_pull(self, seq: int, chunks: tuple[Chunk, ...] = TRAINABLE) -> Ticket:
        ticket = self.client.begin_push_pull(len(chunks))
        self.client.add_push_pull(chunks, PushHeader(seq, 1, (), [b""]), ticket)
        ticket.attend = lambda ready, _: self.loop.answer_all(ready)
        return ticket

    def move(self, epoch: int = 1, address: str = NEW, shard: int = 1) -> None:
        self.client.moved(m.ShardMoved(shard, epoch, address))

    def heard(self, address: str = NEW) -> list[Any]:
        """What this process has been told since this was asked last."""
        return [message for at, message in self.loop.take() if at == address]


def welcome(address: str, message: Any) -> Request | None:
    """What a shard answers, by its address."""
    shard = int(address[-1])
    epoch = {"first": 0, "second": 1, "third": 2}[address[:-2]]
    match message:
        case m.Hello():
            return m.HelloReply(message.request, shard, epoch, 5)
        case m.Contribution() | m.Pull():
            chunk = LAYOUT.chunks[message.chunk]
            return m.Weights(message.request, message.chunk, 9, bytes([100 + epoch]) * chunk.nbytes)
        case _:
            return m.Ack(message.request, 0)


def kinds(messages: list[Any]) -> list[str]:
    return [type(message).__name__ for message in messages]


def here(shard: int) -> list[int]:
    """The shard's trainable chunks, as a step sends them."""
    return [c.index for c in TRAINABLE if c.shard == shard]


def test_the_layout_has_chunks_everywhere() -> None:
    assert len(here(0)) >= 1
    assert len(here(1)) >= 1


# ---------------------------------------------------------------- what is said, and when


def test_what_was_unanswered_follows_the_greeting_under_fresh_numbers_for_the_new_epoch() -> None:
    desk = Desk()
    ticket = desk.push_pull(5)
    before = desk.heard(OLD[1])
    assert [push.chunk for push in before] == here(1)
    desk.move()
    [hello] = desk.heard()
    assert (hello.done, hello.slot, hello.worker_epoch, hello.digest) == (5, 3, 2, LAYOUT.digest)
    assert desk.loop.forgotten == [OLD[1]]
    desk.loop.receive(welcome(NEW, hello))  # type: ignore[arg-type]
    after = desk.heard()
    assert [(p.chunk, p.seq, p.shard_epoch) for p in after] == [(c, 5, 1) for c in here(1)]
    assert [bytes(p.payload) for p in after] == [bytes(p.payload) for p in before]
    assert not {p.request for p in after} & {p.request for p in before}
    for push in before:
        desk.loop.receive(m.Weights(push.request, push.chunk, 3, b"\7" * LAYOUT.chunks[push.chunk].nbytes))
    assert not ticket.settled(), "what the former process says now does not count"
    assert not any(any(desk.memory.arrived[c.index]) for c in OURS)
    for push in after:
        desk.loop.receive(welcome(NEW, push))  # type: ignore[arg-type]
    assert all(set(desk.memory.arrived[c.index]) == {101} for c in OURS)
    assert not ticket.settled(), "the other shard has not answered"


def test_what_has_its_answers_is_not_said_again_and_the_greeting_tells_how_far_that_is() -> None:
    desk = Desk()
    desk.push_pull(5).wait()
    desk.move()
    [hello] = desk.heard()
    assert hello.done == 6
    desk.loop.receive(m.HelloReply(hello.request, 1, 1, 5))
    assert desk.heard() == []
    desk.push_pull(6)
    assert {p.shard_epoch for p in desk.heard()} == {1}


def test_a_step_that_has_been_sent_in_part_is_not_said_to_be_answered() -> None:
    desk = Desk()
    ticket = desk.client.begin_push_pull(len(TRAINABLE))
    header = PushHeader(5, 1, (), [b""])
    ours, others = [c for c in TRAINABLE if c.shard == 1], [c for c in TRAINABLE if c.shard == 0]
    desk.client.add_push_pull(ours, header, ticket)
    desk.loop.receive(*(welcome(OLD[1], push) for push in desk.heard(OLD[1])))  # type: ignore[arg-type]
    desk.move()
    [hello] = desk.heard()
    assert hello.done == 5
    desk.loop.receive(m.HelloReply(hello.request, 1, 1, 5))
    desk.client.add_push_pull(others, header, ticket)
    desk.move(2, "third-1")
    [hello] = desk.heard("third-1")
    assert hello.done == 6, "now it has all been sent, and this shard has answered its part"


def test_other_shards_are_none_the_wiser() -> None:
    desk = Desk()
    ticket = desk.push_pull(5)
    pushes = desk.heard(OLD[0])
    desk.move()
    [(address, hello)] = desk.loop.take()
    assert address == NEW
    desk.loop.receive(*(welcome(OLD[0], push) for push in pushes))  # type: ignore[arg-type]
    assert not ticket.settled()
    desk.loop.receive(welcome(NEW, hello))  # type: ignore[arg-type]
    desk.loop.receive(*(welcome(NEW, push) for push in desk.heard()))  # type: ignore[arg-type]
    ticket.wait()


@pytest.mark.parametrize("window_bytes", [16, 1 << 20])
def test_what_had_not_left_follows_what_had_and_the_credit_is_counted_anew(window_bytes: int) -> None:
    desk = Desk(replace(CONTEXT, window_bytes=window_bytes))
    chunk = next(c for c in TRAINABLE if c.shard == 1)
    tickets = [desk.push_pull(seq, (chunk,)) for seq in (5, 6, 7)]
    desk.move()
    [hello] = desk.heard()
    assert hello.done == 5
    desk.loop.receive(m.HelloReply(hello.request, 1, 1, 5))
    order = []
    while not tickets[2].settled():
        pushes = desk.heard()
        assert len(pushes) == (1 if window_bytes == 16 else 3)
        order += [(p.seq, p.shard_epoch) for p in pushes]
        desk.loop.receive(*(welcome(NEW, push) for push in pushes))  # type: ignore[arg-type]
    assert order == [(5, 1), (6, 1), (7, 1)]
    server = desk.loop.core._servers[OLD[1]]
    assert (server.unanswered_bytes, len(desk.loop.core._in_flight)) == (0, 0)


def test_requests_of_every_kind_are_said_again_and_stages_are_dropped() -> None:
    desk = Desk()
    client, loop = desk.client, desk.loop
    chunk = next(c for c in TRAINABLE if c.shard == 1)
    buffer = LAYOUT.by_kind["buffer"][0]
    client.stage([chunk])
    pull = client.start_pull([chunk], version=4)
    loop.reply = lambda *_: None
    for say in (
        lambda: client.initialise([chunk]),
        lambda: client.push([chunk], PushHeader(5, 1, (), [b""])),
        lambda: client.push([buffer], PushHeader(2, 1, (), [])),
        lambda: client.end_epoch(1, 7, lambda: None),
        client.leave,
    ):
        with pytest.raises(AssertionError, match="for ever"):
            say()
    loop.take()
    desk.move()
    hello, leave = desk.heard()
    assert (hello.done, leave.done) == (5, 6)
    loop.receive(m.HelloReply(hello.request, 1, 1, 5), m.Ack(leave.request, 0))
    said = desk.heard()
    expected = ["Pull", "Init", "Push", "EndEpoch", "Leave"]
    if buffer.shard == 1:
        expected.insert(3, "Push")
    assert kinds(said) == expected
    assert said[0].version == 4
    assert (said[-2].loader, said[-2].epoch) == (1, 7)
    assert not pull.settled()
    assert client.ahead.take(chunk.index, b"") == -1, "its payload has to be sent anew"


def test_one_that_has_left_says_so_again_for_the_checkpoint_may_not_know() -> None:
    desk = Desk()
    desk.push_pull(5).wait()
    desk.client.leave()
    desk.loop.take()
    desk.move()
    hello, leave = desk.heard()
    assert isinstance(leave, m.Leave)
    assert (hello.done, leave.done) == (6, 6)


# ---------------------------------------------------------------- shared memory, payloads sent ahead


def test_shared_memory_is_offered_anew_and_then_used() -> None:
    desk = Desk(attached=True)
    desk.push_pull(5)
    assert kinds(desk.heard(OLD[1])) == ["PushPullShared"] * len(here(1))
    desk.move()
    hello, attach = desk.heard()
    assert (attach.nonce, attach.in_place) == (b"nonce", True)
    desk.loop.receive(welcome(NEW, hello))  # type: ignore[arg-type]
    assert desk.heard() == [], "the offer has no answer yet"
    desk.loop.receive(m.Ack(attach.request, 0))
    assert [(type(p), p.shard_epoch) for p in desk.heard()] == [(m.PushPullShared, 1)] * len(here(1))


def test_where_memory_cannot_be_shared_any_more_payloads_are_sent() -> None:
    desk = Desk(attached=True)
    ticket = desk.push_pull(5)
    desk.heard(OLD[1])
    desk.move()
    hello, attach = desk.heard()
    desk.push_pull(6)  # made while nobody knows yet
    desk.loop.receive(m.Refused(attach.request, Refusal.NOT_SHARED, "elsewhere"), welcome(NEW, hello))  # type: ignore[arg-type]
    pushes = desk.heard()
    assert [(type(p), p.seq, p.shard_epoch) for p in pushes] == [
        *[(m.PushPull, 5, 1)] * len(here(1)),
        *[(m.PushPull, 6, 1)] * len(here(1)),
    ]
    assert all(set(bytes(p.payload)) == {p.chunk} for p in pushes)
    assert desk.loop.core._servers[OLD[1]].unanswered_bytes == 2 * BYTES
    desk.loop.receive(*(welcome(NEW, push) for push in pushes))  # type: ignore[arg-type]
    assert desk.loop.core._servers[OLD[1]].unanswered_bytes == 0
    desk.loop.receive(*(m.WeightsShared(p.request, p.chunk, 6) for p in desk.heard(OLD[0])))
    desk.push_pull(7)
    assert kinds(desk.heard()) == ["PushPull"] * len(here(1))
    assert not ticket.settled() or ticket.error is None


def test_a_push_pull_of_what_was_sent_ahead_takes_its_payload_along() -> None:
    desk = Desk()
    chunk = next(c for c in TRAINABLE if c.shard == 1)
    desk.client.stage([chunk])
    [stage] = desk.heard(OLD[1])
    desk.loop.receive(m.Staged(stage.request, b""))
    ticket = desk.push_pull(5, (chunk,))
    assert kinds(desk.heard(OLD[1])) == ["PushPullStaged"]
    desk.move()
    [hello] = desk.heard()
    assert hello.done == 5
    desk.loop.receive(m.HelloReply(hello.request, 1, 1, 5))
    [push] = desk.heard()
    assert (type(push), push.seq, push.shard_epoch) == (m.PushPull, 5, 1)
    assert bytes(push.payload) == bytes([chunk.index]) * chunk.nbytes
    desk.loop.receive(welcome(NEW, push))  # type: ignore[arg-type]
    ticket.wait()


# ---------------------------------------------------------------- notices at any time


def test_what_is_known_and_what_is_older_is_ignored() -> None:
    desk = Desk()
    desk.push_pull(5)
    desk.loop.take()
    desk.move(2)
    assert kinds(desk.heard()) == ["Hello"]
    desk.move(2)
    desk.move(1, "older-1")
    desk.client.moved(m.ShardMoved(7, 9, "nobody"))
    assert desk.loop.take() == []
    assert desk.client.shard_epochs == (0, 2)


def test_a_second_move_during_the_greeting_begins_anew_with_all_that_waited() -> None:
    desk = Desk(attached=True)
    ticket = desk.push_pull(5)
    desk.heard(OLD[1])
    desk.move()
    first = desk.heard()
    late = desk.push_pull(6)
    desk.move(2, "third-1")
    hello, attach = desk.heard("third-1")
    assert hello.done == 5
    assert desk.loop.forgotten == [OLD[1], NEW]
    desk.loop.receive(m.HelloReply(first[0].request, 1, 1, 5), m.Ack(first[1].request, 0))
    assert desk.heard("third-1") == [], "the second process has not answered"
    desk.loop.receive(m.HelloReply(hello.request, 1, 2, 5), m.Ack(attach.request, 0))
    pushes = desk.heard("third-1")
    assert [(p.seq, p.shard_epoch) for p in pushes] == [(5, 2)] * len(here(1)) + [(6, 2)] * len(here(1))
    assert len({p.request for p in pushes}) == len(pushes)
    desk.loop.receive(*(m.WeightsShared(p.request, p.chunk, 9) for p in pushes))
    for tick in (ticket, late):
        assert tick.error is None
    assert [s.message for s in desk.loop.core._in_flight.values() if s.server == OLD[1]] == []


@pytest.mark.parametrize("said", [False, True], ids=["before the first hello", "before its answer"])
def test_a_move_before_this_worker_is_known_needs_no_greeting_of_its_own(said: bool) -> None:
    loop = Loop(1 << 20)
    client = ParameterClient(cast(ClientThread, loop), CONTEXT, LAYOUT, OLD, Bytes())
    if said:
        with pytest.raises(AssertionError, match="for ever"):
            client.hello()
        loop.take()
    client.moved(m.ShardMoved(1, 1, NEW))
    if said:
        [(address, hello)] = loop.take()
        assert (address, hello.done) == (NEW, -1)
    else:
        loop.reply = welcome
        assert [reply.shard_epoch for reply in client.hello()] == [0, 1]
    assert client.shard_epochs == (0, 1)


def test_a_notice_of_where_it_is_already_greeted_changes_nothing() -> None:
    loop = Loop(1 << 20)
    client = ParameterClient(cast(ClientThread, loop), CONTEXT, LAYOUT, OLD, Bytes())
    client.moved(m.ShardMoved(1, 1, OLD[1]))
    assert loop.forgotten == []
    assert client.shard_epochs == (0, 1)


# ---------------------------------------------------------------- ends


def test_deadlines_begin_anew_with_the_notice_and_with_the_answer_to_the_greeting() -> None:
    desk = Desk()
    ticket = desk.push_pull(5, OURS)
    desk.loop.now_s = 20.0
    desk.move()
    [hello] = desk.heard()
    desk.loop.core.tick(40.0)
    assert not ticket.settled()
    desk.loop.receive(m.HelloReply(hello.request, 1, 1, 5))
    desk.loop.core.tick(64.0)
    for submission in desk.loop.core._in_flight.values():
        assert submission.due_s == 65.0
    desk.loop.core.tick(65.1)
    with pytest.raises(PeerTimeout, match="server/1"):
        ticket.wait()


@pytest.mark.parametrize("refused", [True, False])
def test_a_greeting_that_is_refused_or_not_answered_fails_what_waits_for_it(refused: bool) -> None:
    desk = Desk()
    ticket = desk.push_pull(5, OURS)
    desk.loop.take()
    desk.move()
    [hello] = desk.heard()
    if refused:
        desk.loop.receive(m.Refused(hello.request, Refusal.STALE_EPOCH, "you are not a member"))
    else:
        desk.loop.core.tick(25.1)
        desk.loop.turn()
    with pytest.raises(PeerRefused if refused else PeerTimeout, match="server/1"):
        ticket.wait()


def test_closing_in_the_middle_fails_everything() -> None:
    desk = Desk()
    ticket = desk.push_pull(5, OURS)
    desk.move()
    desk.loop.core.close(PeerError("worker", "over"))
    assert desk.loop.core.outgoing() == []
    with pytest.raises(PeerError, match="over"):
        ticket.wait()


def test_what_nobody_waits_for_any_more_is_not_said_to_the_new_process() -> None:
    desk = Desk()
    ticket = desk.push_pull(5, OURS)
    desk.move()
    [hello] = desk.heard()
    desk.loop.core.abandon(ticket)
    desk.loop.receive(m.HelloReply(hello.request, 1, 1, 5))
    assert desk.heard() == []


class _Silent:
    """A successor that greets nobody."""

    address = NEW

    def greet(self, _pending: list[Submission]) -> list[Submission]:
        return []

    def greeted(self, _said: list[Submission]) -> None:
        pass

    def renewed(self, submission: Submission, _again: bool) -> Submission | None:
        return submission


def test_a_server_that_was_never_asked_can_move() -> None:
    core = ClientCore(100)
    assert core.move("a", _Silent(), 0.0) == "a"
    core.submit(Submission("a", m.Pull(1, "j", 0, 0, 0), Ticket(1), "weights", 9.0), 0.0)
    sent: list[tuple[str, Message]] = core.outgoing()
    assert [address for address, _ in sent] == [NEW]
