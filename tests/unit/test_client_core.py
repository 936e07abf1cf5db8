"""The client's state machine: credit, order, deadlines, what becomes of refusals, and an end for every wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour.client.core import MOST_OPEN, ClientCore, Submission, Ticket
from downpour.client.thread import ClientThread
from downpour_common import messages as m
from downpour_common.errors import (
    DownpourError,
    NonFiniteContribution,
    PeerError,
    PeerRefused,
    PeerTimeout,
    ProtocolError,
)
from downpour_common.messages import Message, Refusal, Request
from downpour_common.transport.memory import MemoryNetwork

A, B = "address-a", "address-b"


def asked(
    core: ClientCore,
    number: int,
    nbytes: int = 0,
    server: str = A,
    ticket: Ticket | None = None,
    timeout_s: float = 10.0,
    now_s: float = 0.0,
    repeat_s: float = 0.0,
) -> Ticket:
    """Submit a pull; its ticket."""
    ticket = ticket or Ticket(1)
    request = m.Pull(number, "job", 0, 0, 0)
    core.submit(Submission(server, request, ticket, f"answer {number}", timeout_s, nbytes, repeat_s), now_s)
    return ticket


def leaving(core: ClientCore) -> list[int]:
    """The numbers of the requests that leave now, in order."""
    return [message.request for _, message in core.outgoing() if isinstance(message, Request)]


def settled(ticket: Ticket) -> bool:
    """Whether ``ticket.wait()`` would return at once."""
    return ticket.settled()


# ---------------------------------------------------------------- credit and order


def test_requests_leave_in_the_order_submitted() -> None:
    core = ClientCore(100)
    for number in (3, 1, 2):
        asked(core, number)
    assert leaving(core) == [3, 1, 2]
    assert leaving(core) == [], "once"


def test_requests_wait_for_credit_and_leave_when_answers_bring_it() -> None:
    core = ClientCore(100)
    for number in (1, 2, 3):
        asked(core, number, nbytes=50)
    assert leaving(core) == [1, 2]
    core.received(m.Ack(1, 0))
    assert leaving(core) == [3]


def test_a_refusal_gives_the_credit_back() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=100)
    asked(core, 2, nbytes=100)
    assert leaving(core) == [1]
    core.received(m.Refused(1, Refusal.MALFORMED, "no"))
    assert leaving(core) == [2]


def test_one_message_larger_than_the_window_is_let_through_alone() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=500)
    asked(core, 2, nbytes=1)
    assert leaving(core) == [1]
    core.received(m.Ack(1, 0))
    assert leaving(core) == [2]


def test_nothing_overtakes_a_request_that_waits_for_credit() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=90)
    asked(core, 2, nbytes=90)
    asked(core, 3, nbytes=0)
    assert leaving(core) == [1]


def test_servers_have_their_own_credit() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=100, server=A)
    asked(core, 2, nbytes=100, server=A)
    asked(core, 3, nbytes=100, server=B)
    assert sorted(leaving(core)) == [1, 3]


@given(
    window=st.integers(1, 50),
    requests=st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 80)), max_size=30),
    answers=st.lists(st.integers(0, 40), max_size=60),
)
def test_unanswered_bytes_stay_within_the_window_and_every_request_leaves_once_in_order(
    window: int, requests: list[tuple[str, int]], answers: list[int]
) -> None:
    core = ClientCore(window)
    sizes = dict(enumerate(requests))
    for number, (server, nbytes) in sizes.items():
        asked(core, number, nbytes, server)
    left: dict[str, list[int]] = {A: [], B: []}
    open_: list[int] = []

    def take() -> None:
        for server, message in core.outgoing():
            assert isinstance(message, Request)
            assert sizes[message.request][0] == server
            left[server].append(message.request)
            open_.append(message.request)
        for server in (A, B):
            under_way = [sizes[n][1] for n in open_ if sizes[n][0] == server]
            large = [nbytes for nbytes in under_way if nbytes]
            assert sum(under_way) <= window or len(large) == 1

    take()
    for answer in answers:
        if open_:
            core.received(m.Ack(open_.pop(answer % len(open_)), 0))
            take()
    while open_:
        core.received(m.Ack(open_.pop(), 0))
        take()
    for server in (A, B):
        assert left[server] == [number for number, (at, _) in sizes.items() if at == server]


# ---------------------------------------------------------------- tickets


def test_a_ticket_is_done_when_all_its_requests_are_answered() -> None:
    core, seen = ClientCore(100), list[Request]()
    ticket = Ticket(2, seen.append, piecewise=True)
    asked(core, 1, ticket=ticket)
    asked(core, 2, ticket=ticket)
    leaving(core)
    core.received(m.Ack(2, 7))
    assert not settled(ticket)
    core.received(m.Ack(1, 8))
    ticket.wait()
    assert seen == [m.Ack(2, 7), m.Ack(1, 8)]
    assert [ticket.answer(), ticket.answer()] == seen


def test_the_result_of_one_request_is_its_answer() -> None:
    core = ClientCore(100)
    ticket = asked(core, 1)
    leaving(core)
    core.received(m.Ack(1, 7))
    assert ticket.result() == m.Ack(1, 7)


def test_a_ticket_for_nothing_is_done_at_once() -> None:
    assert settled(Ticket(0))
    Ticket(0).wait()


def test_answers_that_nobody_waits_for_are_ignored() -> None:
    core = ClientCore(100)
    ticket = Ticket(2)
    asked(core, 1, nbytes=60, ticket=ticket)
    asked(core, 2, nbytes=60, ticket=ticket)
    leaving(core)
    core.received(m.Ack(99, 0))
    core.received(m.Ack(1, 0))
    core.received(m.Ack(1, 0))
    assert not settled(ticket), "a repeated answer counts once"
    assert leaving(core) == [2]
    core.received(m.Ack(2, 0))
    ticket.wait()


def test_the_first_error_counts_and_later_answers_change_nothing() -> None:
    core, seen = ClientCore(100), list[Request]()
    ticket = Ticket(3, seen.append)
    for number in (1, 2, 3):
        asked(core, number, ticket=ticket)
    leaving(core)
    core.received(m.Refused(2, Refusal.NON_FINITE, "first"))
    core.received(m.Refused(1, Refusal.MALFORMED, "second"))
    core.received(m.Ack(3, 0))
    with pytest.raises(NonFiniteContribution, match="first"):
        ticket.wait()
    assert ticket.answer() is None, "who goes on piece by piece learns of it too"
    assert seen == []


# ---------------------------------------------------------------- deadlines


def test_what_is_in_flight_fails_after_its_deadline_by_name() -> None:
    core = ClientCore(100)
    core.name(A, "server/3")
    ticket = asked(core, 1, timeout_s=10.0, now_s=5.0)
    leaving(core)
    core.tick(15.0)
    assert not settled(ticket)
    core.tick(15.1)
    with pytest.raises(PeerTimeout) as caught:
        ticket.wait()
    assert (caught.value.peer, caught.value.awaited, caught.value.after_s) == ("server/3", "answer 1", 10.0)
    assert "server/3" in str(caught.value)
    assert "answer 1" in str(caught.value)


def test_what_waits_for_credit_fails_after_its_deadline_too() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=100, timeout_s=1000.0)
    waiting = [asked(core, number, nbytes=100) for number in (2, 3)]
    leaving(core)
    core.tick(10.1)
    for ticket in waiting:
        with pytest.raises(PeerTimeout):
            ticket.wait()


def test_a_short_deadline_is_kept_behind_a_long_one() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=100, timeout_s=1000.0)
    asked(core, 2, nbytes=100, timeout_s=1000.0)
    short = asked(core, 3, nbytes=100, timeout_s=1.0)
    leaving(core)
    core.tick(2.0)
    assert settled(short)


def test_an_overdue_request_gives_its_credit_back_and_a_late_answer_is_ignored() -> None:
    core = ClientCore(100)
    late = asked(core, 1, nbytes=100)
    asked(core, 2, nbytes=100, now_s=5.0)
    leaving(core)
    core.tick(10.1)
    assert leaving(core) == [2]
    core.received(m.Ack(1, 0))
    with pytest.raises(PeerTimeout):
        late.wait()
    asked(core, 3, nbytes=100)
    assert leaving(core) == [], "the late answer brought no credit"


# ---------------------------------------------------------------- repeats


def repeated(core: ClientCore, now_s: float) -> list[int]:
    """The numbers of the requests that leave once it is this late."""
    core.tick(now_s)
    return leaving(core)


def test_a_request_is_repeated_with_its_number_until_it_is_answered() -> None:
    core = ClientCore(100)
    ticket = asked(core, 1, repeat_s=2.0, now_s=50.0, timeout_s=100.0)
    assert leaving(core) == [1]
    assert [repeated(core, now_s) for now_s in (51.9, 52.0, 53.9, 54.0)] == [[], [1], [], [1]]
    core.received(m.Ack(1, 5))
    core.received(m.Ack(1, 6))
    assert repeated(core, 60.0) == []
    assert ticket.result() == m.Ack(1, 5), "the first answer counts"


def test_requests_to_shards_are_never_repeated() -> None:
    core = ClientCore(100)
    asked(core, 1, timeout_s=100.0, now_s=50.0)
    assert leaving(core) == [1]
    assert repeated(core, 99.0) == []


def test_what_is_overdue_is_not_repeated() -> None:
    core = ClientCore(100)
    ticket = asked(core, 1, repeat_s=2.0, now_s=50.0, timeout_s=5.0)
    leaving(core)
    assert repeated(core, 55.1) == []
    assert settled(ticket)


def test_an_answer_that_comes_before_the_repeat_has_left_stops_it() -> None:
    core = ClientCore(100)
    asked(core, 1, repeat_s=2.0, now_s=50.0)
    leaving(core)
    core.tick(52.0)
    core.received(m.Ack(1, 0))
    assert leaving(core) == []


def test_while_a_server_is_silent_one_request_at_a_time_is_repeated_in_turn() -> None:
    core = ClientCore(100)
    for number in (1, 2, 3):
        asked(core, number, repeat_s=2.0, now_s=50.0, timeout_s=1000.0)
    assert leaving(core) == [1, 2, 3]
    assert [repeated(core, 52.0 + 0.5 * tick) for tick in range(17)] == [
        *[[1], [], [], []],
        *[[2], [], [], []],
        *[[3], [], [], []],
        *[[1], [], [], []],
        [2],
    ]
    core.received(m.Ack(2, 0))
    assert repeated(core, 62.0) == [1, 3], "it is there again"


def test_the_coordinator_need_not_remember_more_answers_than_a_few() -> None:
    core = ClientCore(100)
    for number in range(1, MOST_OPEN + 4):
        asked(core, number, repeat_s=2.0)
    assert leaving(core) == list(range(1, MOST_OPEN + 1))
    asked(core, 900, server=B, repeat_s=2.0)
    assert leaving(core) == [900], "another server"
    core.received(m.Refused(7, Refusal.MALFORMED, "no"))
    core.received(m.Ack(9, 0))
    assert leaving(core) == [MOST_OPEN + 1, MOST_OPEN + 2]


def test_what_nobody_waits_for_any_more_neither_leaves_nor_is_repeated() -> None:
    core = ClientCore(100)
    gone = Ticket(2)
    asked(core, 1, nbytes=100, ticket=gone, repeat_s=2.0, now_s=50.0)
    asked(core, 2, nbytes=100, ticket=gone, repeat_s=2.0, now_s=50.0)
    asked(core, 3, nbytes=100, now_s=50.0)
    assert leaving(core) == [1]
    core.abandon(gone)
    assert leaving(core) == [3]
    assert repeated(core, 55.0) == []
    core.received(m.Ack(1, 0))
    assert not settled(gone)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("code", list(Refusal))
def test_a_refusal_becomes_an_error_that_names_the_peer_and_the_reason(code: Refusal) -> None:
    core = ClientCore(100)
    core.name(A, "server/3")
    ticket = asked(core, 1)
    leaving(core)
    core.received(m.Refused(1, code.value, "because of that"))
    expected = {Refusal.NON_FINITE: NonFiniteContribution, Refusal.TIMED_OUT: PeerTimeout}.get(code, PeerRefused)
    with pytest.raises(DownpourError, match=r"server/3.*because of that") as caught:
        ticket.wait()
    assert type(caught.value) is expected
    if isinstance(caught.value, PeerRefused):
        assert (caught.value.peer, caught.value.code) == ("server/3", code)
        more = "; this process takes no part in the job any more and must end" if code == Refusal.STALE_EPOCH else ""
        assert caught.value.reason == f"because of that{more}"
    if isinstance(caught.value, PeerTimeout):
        assert (caught.value.peer, caught.value.awaited) == ("server/3", "answer 1")


def test_a_server_is_called_by_its_address_until_it_has_a_name() -> None:
    core = ClientCore(100)
    ticket = asked(core, 1)
    leaving(core)
    core.tick(10.1)
    with pytest.raises(PeerTimeout, match=A):
        ticket.wait()


def test_naming_a_server_loses_nothing_that_is_on_its_way_there() -> None:
    core = ClientCore(100)
    asked(core, 1, nbytes=100)
    asked(core, 2, nbytes=100)
    assert leaving(core) == [1]
    core.name(A, "server/3")
    assert leaving(core) == [], "1 is still unanswered"
    core.received(m.Ack(1, 0))
    assert leaving(core) == [2]


# ---------------------------------------------------------------- the end


def test_closing_fails_what_is_in_flight_what_waits_and_what_comes_later() -> None:
    core, error = ClientCore(100), PeerError("worker", "over")
    tickets = [asked(core, 1, nbytes=100), asked(core, 2, nbytes=100)]
    assert leaving(core) == [1]
    core.close(error)
    tickets.append(asked(core, 3))
    for ticket in tickets:
        with pytest.raises(PeerError, match="over") as caught:
            ticket.wait()
        assert caught.value is error
    assert leaving(core) == []


def test_closing_leaves_finished_tickets_alone() -> None:
    core = ClientCore(100)
    ticket = asked(core, 1)
    leaving(core)
    core.received(m.Ack(1, 7))
    core.close(PeerError("worker", "over"))
    assert ticket.result() == m.Ack(1, 7)


def test_an_answer_that_cannot_be_taken_leaves_nobody_waiting() -> None:
    """The thread ends when ``on_answer`` raises, and closes the core: the ticket must not be forgotten."""
    core = ClientCore(100)

    def refuse(_: Request) -> None:
        raise ProtocolError("16 bytes expected, 15 found")

    ticket = Ticket(1, refuse)
    asked(core, 1, ticket=ticket)
    leaving(core)
    try:
        core.received(m.Weights(1, 0, 0, b""))
    except ProtocolError as error:
        core.close(error)
    assert settled(ticket)
    with pytest.raises(DownpourError, match="15 found"):
        ticket.wait()


def test_requests_after_the_threads_end_fail_instead_of_waiting_for_ever() -> None:
    network = MemoryNetwork()
    network.server(A)
    thread = ClientThread(network.client(), 100, _ignore)
    thread.close()
    ticket = Ticket(1)
    thread.submit([Submission(A, m.Pull(1, "job", 0, 0, 0), ticket, "weights", 1000.0)])
    assert settled(ticket)
    with pytest.raises(DownpourError):
        ticket.wait()


def test_closing_the_thread_sends_what_was_told_before() -> None:
    network = MemoryNetwork()
    server = network.server(A)
    thread = ClientThread(network.client(), 100, _ignore)
    for clock in range(3):
        thread.tell(A, m.ReportFailure("job", 0, 0, f"error {clock}", ""))
    thread.close()
    told = [message for _ in range(3) for _, message in server.poll(0)]
    assert told == [m.ReportFailure("job", 0, 0, f"error {clock}", "") for clock in range(3)]


def _ignore(_: Message) -> None:
    pass
