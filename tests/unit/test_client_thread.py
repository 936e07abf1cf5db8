"""The turn: whoever waits runs the client's loop; nothing is lost or stuck when it changes hands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from downpour.client.core import Submission, Ticket
from downpour.client.shield import Shield
from downpour.client.thread import ClientThread
from downpour_common import messages as m
from downpour_common.errors import PeerError
from downpour_common.messages import Message, Request
from downpour_common.transport.memory import MemoryClient, MemoryNetwork, MemoryServer

A = "server-a"
CHUNK_BYTES = 8


class Echo:
    """A server that acknowledges everything, in a thread; ``hold`` keeps it from answering until ``let_go``."""

    def __init__(self, network: MemoryNetwork, hold: bool = False) -> None:
        self._server: MemoryServer = network.server(A)
        self._go = threading.Event()
        if not hold:
            self._go.set()
        self._over = threading.Event()
        self.first = threading.Event()
        """something has arrived"""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            for peer, message in self._server.poll(0.05):
                self.first.set()
                self._go.wait(20.0)
                assert isinstance(message, Request)
                self._server.send(peer, m.Ack(message.request, 0))

    def let_go(self) -> None:
        self._go.set()

    def close(self) -> None:
        self._go.set()
        self._over.set()
        self._server.wake()
        self._thread.join()


class Watched(MemoryClient):
    """Tells when the main thread is in the loop, and strikes it there with a signal."""

    def __init__(self, network: MemoryNetwork, number: signal.Signals) -> None:
        super().__init__(network, b"client")
        self._number = number
        self._struck = False

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        if threading.current_thread() is threading.main_thread() and not self._struck:
            self._struck = True
            signal.raise_signal(self._number)
        return super().poll(timeout_s)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def echo(network: MemoryNetwork) -> Iterator[Echo]:
    server = Echo(network)
    yield server
    server.close()


def pull(thread: ClientThread, ticket: Ticket, nbytes: int = 0) -> Submission:
    return Submission(A, m.Pull(thread.number(), "job", 0, 0, 0), ticket, "weights", 20.0, nbytes)


def test_many_threads_that_wait_at_once_all_get_their_answers(network: MemoryNetwork, echo: Echo) -> None:
    thread = ClientThread(network.client(), CHUNK_BYTES, _ignore)
    answered = [0] * 6

    def ask(who: int) -> None:
        for _ in range(100):
            ticket = Ticket(3)
            thread.submit([pull(thread, ticket, CHUNK_BYTES) for _ in range(3)])
            ticket.wait()
            answered[who] += 1

    callers = [threading.Thread(target=ask, args=(who,)) for who in range(len(answered))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60.0)
    thread.close()
    assert answered == [100] * len(answered)


def test_what_waits_for_credit_leaves_although_nobody_waits_for_it(network: MemoryNetwork, echo: Echo) -> None:
    thread = ClientThread(network.client(), CHUNK_BYTES, _ignore)
    done = threading.Event()
    left = [50]

    def count(_: Request) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    thread.ask(A, m.Pull(thread.number(), "job", 0, 0, 0), "weights", 20.0)  # has had the turn just now
    ticket = Ticket(50, count)
    thread.submit([pull(thread, ticket, CHUNK_BYTES) for _ in range(50)])
    assert done.wait(20.0)
    thread.close()


def test_answers_come_piece_by_piece_and_are_let_go_otherwise(network: MemoryNetwork, echo: Echo) -> None:
    thread = ClientThread(network.client(), 100, _ignore)
    seen: list[Request] = []
    ticket = Ticket(3, seen.append, piecewise=True)
    thread.submit([pull(thread, ticket) for _ in range(3)])
    assert [ticket.answer(), ticket.answer(), ticket.answer()] == seen
    thread.close()


def test_a_thread_has_its_answer_while_another_one_goes_on_waiting(network: MemoryNetwork, echo: Echo) -> None:
    thread = ClientThread(network.client(), CHUNK_BYTES, _ignore)
    network.server("silent")
    never = Ticket(1)
    late = [Submission("silent", m.Pull(thread.number(), "job", 0, 0, 0), never, "weights", 60.0)]
    thread.submit(late)

    def wait() -> None:
        with pytest.raises(PeerError, match="closed"):
            never.wait()

    other = threading.Thread(target=wait)
    other.start()
    for _ in range(300):  # each would take until the other's turn ends, a second
        thread.ask(A, m.Pull(thread.number(), "job", 0, 0, 0), "weights", 20.0)
    thread.close()
    other.join(20.0)
    assert not other.is_alive()


def test_a_script_that_sends_all_the_time_and_never_waits_is_told_things(network: MemoryNetwork, echo: Echo) -> None:
    thread = ClientThread(network.client(), CHUNK_BYTES, _ignore)
    thread.ask(A, m.Pull(thread.number(), "job", 0, 0, 0), "weights", 20.0)  # has had the turn just now
    answered, pause = threading.Event(), threading.Event()
    thread.submit([pull(thread, Ticket(1, lambda _: answered.set()))])
    for _ in range(1000):
        if answered.is_set():
            break
        thread.name(A, "server")
        pause.wait(0.005)
    assert answered.is_set()
    thread.close()


def test_a_fork_of_the_worker_is_told_that_it_is_one(
    network: MemoryNetwork, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = ClientThread(network.client(), CHUNK_BYTES, _ignore)
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        with pytest.raises(PeerError, match="forked"):
            thread.ask(A, m.Pull(thread.number(), "job", 0, 0, 0), "weights", 20.0)
    thread.close()


def test_a_failure_in_the_loop_fails_what_waits_whoever_has_the_turn(network: MemoryNetwork) -> None:
    class Broken(MemoryClient):
        def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
            arrived = super().poll(timeout_s)
            if any(isinstance(message, Request) for _, message in arrived):
                raise OSError("the network is on fire")
            return arrived

    server = Echo(network)
    thread = ClientThread(Broken(network, b"client"), 100, _ignore)
    ticket = Ticket(1)
    thread.submit([pull(thread, ticket)])
    with pytest.raises(PeerError, match="on fire"):
        ticket.wait()
    late = Ticket(1)
    thread.submit([pull(thread, late)])
    with pytest.raises(PeerError, match="on fire"):
        late.wait()
    thread.close()
    server.close()


def test_what_is_submitted_while_the_client_closes_fails_instead_of_waiting_for_ever(network: MemoryNetwork) -> None:
    ticket = Ticket(1)

    class Closing(MemoryClient):
        def close(self) -> None:
            late = threading.Thread(target=lambda: thread.submit([pull(thread, ticket)]))
            late.start()
            late.join()
            super().close()

    thread = ClientThread(Closing(network, b"client"), CHUNK_BYTES, _ignore)
    thread.close()
    assert ticket.settled()
    with pytest.raises(PeerError, match="closed"):
        ticket.wait()


def test_interrupting_a_wait_leaves_the_operation_under_way_and_the_client_usable(network: MemoryNetwork) -> None:
    server = Echo(network, hold=True)
    thread = ClientThread(Watched(network, signal.SIGINT), 100, _ignore)
    ticket = Ticket(1)
    thread.submit([pull(thread, ticket)])
    with pytest.raises(KeyboardInterrupt):
        ticket.wait()
    assert not ticket.settled()
    server.let_go()
    ticket.wait()
    thread.close()
    server.close()


def test_a_signal_handler_that_raises_in_the_middle_ends_the_client_instead_of_confusing_it(
    network: MemoryNetwork,
) -> None:
    class Bell(BaseException):
        pass

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Bell

    server = Echo(network, hold=True)
    thread = ClientThread(Watched(network, signal.SIGUSR1), 100, _ignore)
    ticket = Ticket(1)
    before = signal.signal(signal.SIGUSR1, ring)
    try:
        thread.submit([pull(thread, ticket)])
        with pytest.raises(Bell):
            ticket.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(PeerError, match="interrupted"):
        ticket.wait()
    thread.close()
    server.close()


def test_a_shield_puts_the_interrupt_off_and_delivers_it_then() -> None:
    reached = []

    def section() -> None:
        with Shield() as shield:
            signal.raise_signal(signal.SIGINT)
            reached.append(shield.struck)

    with pytest.raises(KeyboardInterrupt):
        section()
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_shield_lets_an_ignored_interrupt_be() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Shield() as shield:
            signal.raise_signal(signal.SIGINT)
        assert not shield.struck
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore(_: Message) -> None:
    pass
