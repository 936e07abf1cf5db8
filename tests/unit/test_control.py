"""A worker and its coordinator: what is said, again and again while nobody answers, and how waits end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import downpour.client.thread
import downpour.control
from downpour.client.thread import ClientThread
from downpour.context import WorkerContext
from downpour.control import Control
from downpour.engine import Counters
from downpour_common import messages as m
from downpour_common.errors import ConfigError, ModelMismatch, PeerRefused, PeerTimeout
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.transport.memory import MemoryNetwork

CONTEXT = WorkerContext(
    "j", 3, 2, 4, 1, "coordinator", "async", "cpu", 0, "average", 1, 1, 1024, 1 << 20, False, 20.0, 20.0
)
MODEL = ModelSpec((), "SGD", ({"lr": 1.0},), "average")
ME = ("j", 3, 2)


class Leaves(Exception):
    """Raised by a leave point."""


class Desk:
    """The coordinator's side: answers as the test says, or not at all."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.server = self.network.server("coordinator")
        self.heard: list[Any] = []
        self.leaving = threading.Event()
        self.thread = ClientThread(self.network.client(), 1 << 20, self._ignore)
        self.control = Control(self.thread, replace(CONTEXT, timeout_s=-4.0), self._leave_point)

    def _ignore(self, _: Message) -> None:
        pass

    def _leave_point(self) -> None:
        if self.leaving.is_set():
            raise Leaves

    def answer(self, make: Callable[[Any], Message | None], heard: int = 1) -> threading.Thread:
        """In a thread: hear this many messages, and answer each with what ``make`` gives."""

        def serve() -> None:
            deadline_s = time.monotonic() + 20
            while len(self.heard) < heard and time.monotonic() < deadline_s:
                for peer, message in self.server.poll(0.05):
                    self.heard.append(message)
                    if (answer := make(message)) is not None:
                        self.server.send(peer, answer)

        thread = threading.Thread(target=serve)
        thread.start()
        return thread


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(downpour.client.thread, "TICK_S", 0.005)
    monkeypatch.setattr(downpour.client.thread, "LOOK_S", 0.005)
    monkeypatch.setattr(downpour.client.thread, "REPEAT_S", 0.02)
    monkeypatch.setattr(downpour.control, "REPEAT_S", 0.02)
    desk = Desk()
    desk.control._timeout_s = 20.0
    yield desk
    desk.thread.close()


def test_a_request_is_repeated_with_its_number_until_it_is_answered(desk: Desk) -> None:
    seen: list[int] = []

    def fourth(take: m.TakeLease) -> Message | None:
        seen.append(take.request)
        return m.Lease(take.request, 8, 12) if len(seen) == 4 else None

    server = desk.answer(fourth, 4)
    assert desk.control.take_lease(1, 2, 100, 4, "d", [(0, 4), (6, 8)]) == m.Lease(seen[0], 8, 12)
    server.join()
    assert set(desk.heard) == {m.TakeLease(seen[0], *ME, 1, 2, 100, 4, "d", (0, 4, 6, 8))}


def test_everything_names_job_slot_and_epoch(desk: Desk) -> None:
    answers = {m.BeginPass: lambda r: m.PassBegins(r, 5, 4)}

    def make(message: Any) -> Message | None:
        if not isinstance(message, m.Request):
            return None
        return answers.get(type(message), lambda r: m.Ack(r, 0))(message.request)

    server = desk.answer(make, 6)
    assert desk.control.begin_pass(0, 7, 9).workers == 5
    desk.control.barrier()
    desk.control.log(11, {"loss": 0.5})
    desk.control.settle()
    desk.control.goodbye(True, 17, (3, 8))
    desk.control.progress(Counters(5, samples=6, pushes=7, pulls=8, wait_s=1.5), 5, 2, (9, 10), (3, 4))
    desk.control.failed(ValueError("bad"), "x" * 70_000 + "end")
    server.join()
    begin, barrier, log, goodbye, progress, failure = desk.heard
    assert all((x.job, x.slot, x.worker_epoch) == ME for x in desk.heard)
    assert (begin.loader, begin.epoch, begin.clock) == (0, 7, 9)
    assert barrier.name == "barrier"
    assert (log.clock, log.values) == (11, {"loss": 0.5})
    assert (goodbye.drained, goodbye.torn, goodbye.first, goodbye.done) == (True, 17, 3, 8)
    assert progress == m.Progress(*ME, 5, 2, 6, 7, 8, 9, 10, 1.5, (3, 4))
    assert failure.error == "ValueError: bad"
    assert len(failure.traceback) == 60_000
    assert failure.traceback.endswith("end")


def test_workers_agree_and_who_has_no_proposal_waits(desk: Desk) -> None:
    seen: list[m.Agree] = []

    def third(agree: m.Agree) -> Message | None:
        seen.append(agree)
        return m.Agreed(agree.request, b"first") if len(seen) % 3 == 0 else None

    server = desk.answer(third, 6)
    assert desk.control.agree("plan", b"mine") == b"first"
    assert desk.control.agree("group/0/2") == b"first"
    server.join()
    assert (
        seen
        == [m.Agree(seen[0].request, *ME, "plan", b"mine", True)] * 3
        + [m.Agree(seen[3].request, *ME, "group/0/2", b"", False)] * 3
    )


def test_who_waits_for_others_to_agree_may_leave(desk: Desk) -> None:
    desk.leaving.set()
    with pytest.raises(Leaves):
        desk.control.agree("plan")


def test_logging_waits_for_nobody_and_the_end_waits_for_what_was_logged(desk: Desk) -> None:
    for clock in range(100):
        desk.control.log(clock, {"loss": float(clock)})
    rows: dict[int, int] = {}

    def note(log: m.LogMetrics) -> Message:
        rows.setdefault(log.request, log.clock)
        return m.Ack(log.request, 0)

    server = desk.answer(note, 100)
    desk.control.settle()
    server.join()
    assert list(rows.values()) == list(range(100)), "in order"


def test_an_end_that_nobody_notes_is_an_error(desk: Desk) -> None:
    desk.control.log(1, {})
    desk.control._timeout_s = 0.05
    with pytest.raises(PeerTimeout, match="metrics"):
        desk.control.settle()


def test_a_worker_that_has_been_replaced_learns_it_from_whatever_it_says(desk: Desk) -> None:
    desk.control.log(1, {})
    server = desk.answer(lambda x: m.Refused(x.request, Refusal.STALE_EPOCH, "worker/3 has been replaced"))
    server.join()
    assert desk.control._unnoted[0].settled(20)
    with pytest.raises(PeerRefused, match=r"has been replaced.*must end"):
        desk.control.log(2, {})


def test_a_model_that_differs_is_a_mismatch(desk: Desk) -> None:
    server = desk.answer(lambda x: m.Refused(x.request, Refusal.MODEL_DIFFERS, "tensor a"))
    with pytest.raises(ModelMismatch, match="tensor a"):
        desk.control.register(MODEL)
    server.join()


@pytest.mark.parametrize(
    "wait", [lambda c: c.barrier(), lambda c: c.take_lease(0, 0, 10, 1, "", [])], ids=["barrier", "lease"]
)
def test_a_wait_may_be_left_and_is_not_repeated_then(desk: Desk, wait: Callable[[Control], object]) -> None:
    server = desk.answer(lambda _: desk.leaving.set())
    with pytest.raises(Leaves):
        wait(desk.control)
    server.join()
    deadline_s = time.monotonic() + 20
    while desk.thread._core._in_flight and time.monotonic() < deadline_s:
        threading.Event().wait(0.001)
    assert not desk.thread._core._in_flight


def test_what_was_said_last_of_the_progress_is_said_again(desk: Desk) -> None:
    server = desk.answer(lambda _: None, 4)
    desk.control.progress(Counters(1), 1, 0, (0, 0), (0,))
    desk.control.progress(Counters(2), 2, 0, (0, 0), (0,))
    server.join()
    assert [x.clock for x in desk.heard] == [1, 2, 2, 2]


# ---------------------------------------------------------------- keys

COORDINATOR, PUBLIC, SECRET, SHARDS = "abcdefghij" * 4, "ABCDEFGHIJ" * 4, "0123456789" * 4, "aAbBcCdDeE" * 4
KEYS = {"coordinator": COORDINATOR, "job": [PUBLIC, SECRET], "shards": SHARDS}


def test_a_worker_expects_one_key_of_the_coordinator_and_another_of_shards() -> None:
    assert CONTEXT.transport_keys() is None
    keys = replace(CONTEXT, keys=KEYS).transport_keys()
    assert keys is not None
    assert keys.pair.public == PUBLIC
    assert (keys.server_at("coordinator"), keys.server_at("server-0")) == (COORDINATOR, SHARDS)


@pytest.mark.parametrize("missing", list(KEYS))
def test_keys_that_are_not_all_there_are_refused_without_telling_them(missing: str) -> None:
    keys = {name: key for name, key in KEYS.items() if name != missing}
    with pytest.raises(ConfigError) as caught:
        replace(CONTEXT, keys=keys).transport_keys()
    assert not any(key in str(caught.value) for key in (COORDINATOR, PUBLIC, SECRET, SHARDS))
