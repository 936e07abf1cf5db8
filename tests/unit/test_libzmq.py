"""The calls into libzmq that keep Python's lock: what is copied, what is lent, and when it is let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from socket import socketpair

import pytest
import zmq
from zmq.backend.cython import _zmq

from downpour_common.errors import ConfigError
from downpour_common.transport import libzmq
from downpour_common.transport.libzmq import LENT_BYTES, Lends, Lent, Library, Line, Waiting
from downpour_common.wire import Frame

LARGE = 1 << 20


class Memory(bytearray):
    """A bytearray that can be watched."""


@dataclass
class Ends:
    """Two ends of a connection within this process."""

    library: Library
    lends: Lends
    asking: Line
    answering: Line
    context: zmq.Context[zmq.Socket[bytes]]

    def receive(self) -> list[Frame]:
        assert self.library.wait(Waiting([self.answering.handle]), 5_000) == [0]
        found = self.answering.receive(1)
        assert found is not None
        frames, user = found
        assert user == ""
        return frames


@pytest.fixture
def ends() -> Iterator[Ends]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    library, lends = Library(_zmq.__file__), Lends()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind("inproc://both")
    other.connect("inproc://both")
    lines = Line(library, one.underlying, lends), Line(library, other.underlying, lends)
    yield Ends(library, lends, *lines, context)
    for line, socket in zip(lines, (one, other), strict=True):
        line.close()
        socket.close(linger=0)
    context.term()
    lends.clear()


@pytest.mark.parametrize("size", [0, 1, 29, 30, 100, 8191, LENT_BYTES - 1, LENT_BYTES, LENT_BYTES + 1, LARGE])
@pytest.mark.parametrize("lend_from", [0, LARGE + 1])
def test_what_is_sent_arrives(ends: Ends, size: int, lend_from: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    messages: list[list[Frame]] = [[b"header", payload], [b"", memoryview(bytearray(payload))]]
    for frames in messages if size or lend_from else messages[:1]:
        ends.asking.send(frames, lend_from)
        arrived = ends.receive()
        assert [bytes(frame) for frame in arrived] == [bytes(frame) for frame in frames]
        assert type(arrived[0]) is bytes
        view = memoryview(arrived[1])
        assert (view.format, view.contiguous, view.readonly) == ("B", True, False)


def test_a_message_of_several_kinds_of_frames_arrives_whole(ends: Ends) -> None:
    frames: list[Frame] = [b"a", bytes(LARGE), b"b" * 100, bytearray(b"c" * LARGE)]
    ends.asking.send(frames, LARGE)
    assert [bytes(frame) for frame in ends.receive()] == [bytes(frame) for frame in frames]
    assert ends.answering.receive(1) is None


def test_a_lent_payload_is_read_where_it_lies_and_let_go_when_it_has_been_read(ends: Ends) -> None:
    memory = Memory(LARGE)
    watched = weakref.ref(memory)
    lent = ends.asking.send([b"", memory], LARGE)
    assert isinstance(lent, Lent)
    assert not lent.done
    memory[0] = 7  # inproc passes the memory itself on
    del memory
    gc.collect()
    assert watched() is not None
    (_, payload) = ends.receive()
    assert payload[0] == 7
    ends.lends.release()
    assert not lent.done
    del payload
    assert [lent.done, lent.done] == [True, True]
    ends.lends.release()
    gc.collect()
    assert watched() is None


def test_part_of_what_arrived_keeps_all_of_it(ends: Ends) -> None:
    ends.asking.send([b"", bytearray(b"x" * LARGE)], LARGE)
    (_, payload) = ends.receive()
    part = memoryview(payload)[10:20]
    del payload
    gc.collect()
    ends.asking.send([b"", bytearray(b"y" * LARGE)], LARGE)
    assert bytes(memoryview(ends.receive()[1])[:5]) == b"yyyyy"
    assert bytes(part) == b"x" * 10


def test_memory_that_may_not_be_written_to_is_copied(ends: Ends) -> None:
    assert ends.asking.send([b"", memoryview(bytes(LARGE))], 0) is None
    assert memoryview(ends.receive()[1]).nbytes == LARGE
    lent = ends.asking.send([b"", bytes(LARGE)], 0)
    assert isinstance(lent, Lent)
    assert not lent.done


def test_finished_sends_behind_one_that_is_not_are_let_go(ends: Ends) -> None:
    held: list[object] = []
    sends = []
    for number in range(200):
        memory = Memory(LENT_BYTES)
        sends.append(weakref.ref(memory))
        ends.asking.send([b"", memory], 0)
        del memory
        arrived = ends.receive()
        if number == 0:
            held.append(arrived)  # a peer that does not read
        del arrived
        ends.lends.release()
    gc.collect()
    assert sends[0]() is not None
    assert sum(memory() is not None for memory in sends) < 50


def test_flags_are_used_again(ends: Ends) -> None:
    for _ in range(3):
        lents = []
        for _ in range(1500):
            lents.append(ends.asking.send([b"", bytes(LENT_BYTES)], 0))
            if len(lents) % 500 == 0:
                while ends.answering.receive(1) is not None:
                    pass
        assert all(lent is not None and lent.done for lent in lents)
        ends.lends.release()
    assert len(libzmq._free_flags) <= 4 * 1024


def test_nobody_to_send_to_is_told(ends: Ends) -> None:
    socket: zmq.Socket[bytes] = ends.context.socket(zmq.DEALER)
    try:
        line = Line(ends.library, socket.underlying, ends.lends)
        memory = bytearray(LARGE)
        messages: list[list[Frame]] = [[b"header"], [memory], [b"header", memory]]
        for frames in messages:
            with pytest.raises(BlockingIOError):
                line.send(frames, LARGE)
        memory.append(0)  # nothing holds on to it
        line.close()
    finally:
        socket.close(linger=0)


def test_without_the_note_everything_is_copied(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libzmq, "_NOTE", "no_such_function")
    copying = Line(Library(_zmq.__file__), ends.asking.handle, ends.lends)
    assert copying.send([b"", bytearray(LARGE)], 0) is None
    assert memoryview(ends.receive()[1]).nbytes == LARGE
    copying.close()


def test_something_that_is_not_linked_to_libzmq_is_refused() -> None:
    with pytest.raises(ConfigError, match="wheels"):
        Library("libc.so.6")


def test_a_wait_is_over_when_nothing_comes_and_when_the_descriptor_is_ready(ends: Ends) -> None:
    one, other = socketpair()
    with one, other:
        waiting = Waiting([ends.answering.handle, ends.asking.handle], one.fileno())
        assert ends.library.wait(waiting, 1) == []
        other.send(b"w")
        assert ends.library.wait(waiting, 5_000) == [2]
        ends.asking.send([b"header"], LARGE)
        assert ends.library.wait(waiting, 5_000)[0] == 0
