"""The client's state machine: what waits for credit, what is in flight, what is overdue. No sockets, no clock.

Credit: at most ``window_bytes`` of payload per server are unanswered (one message is always let through), so a
server's memory is bounded whatever the number of messages. Requests to one server leave in the order submitted.

Repeats: a request to the coordinator is sent again, with its number, until it is answered or overdue, because the
coordinator may be restarted. While it is silent only one request is repeated at a time: ZeroMQ keeps what is sent to
a peer that is away, and may keep it for long. At most :data:`MOST_OPEN` such requests are unanswered, so the
coordinator need not remember more answers. Requests to shards are never repeated to the same process.

Moves: a server that is another process now (:meth:`ClientCore.move`) is greeted first. Once that is answered, what the
former process has not answered leaves again, in order, before what has waited, and what it still answers is ignored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

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

OnAnswer = Callable[[Request], None]
Ready = Callable[[], bool]
REPEAT_S = 2.0
"""For what is to be repeated: the time without an answer after which it is."""
MOST_OPEN = 32
"""Unanswered requests that are repeated, per server."""
WAIT_S = 1.0
"""How long a wait attends at a time; it goes on until the ticket is settled."""


class Ticket:
    """An operation under way: any number of requests that are awaited together.

    ``on_answer`` runs for each answer, in the thread that receives it; then the answer is let go, unless it is to be
    kept ``piecewise`` for :meth:`answer`. ``attend`` is how a thread waits,
    see :meth:`downpour.client.thread.ClientThread.attend`; it is there once a request has been submitted.
    """

    def __init__(self, count: int, on_answer: OnAnswer | None = None, piecewise: bool = False) -> None:
        self.on_answer = on_answer
        self._keeps = piecewise or on_answer is None
        self.error: DownpourError | None = None
        self.attend: Callable[[Ready, float], None] | None = None
        self._answers: deque[Request] = deque()
        self._open = count
        self._done = count == 0

    def answered(self, message: Request) -> None:
        """One of the requests has its answer."""
        if self.error is not None:
            return
        if self.on_answer is not None:
            try:
                self.on_answer(message)
            except Exception as problem:
                self.failed(ProtocolError(f"an answer cannot be used: {type(problem).__name__}: {problem}"))
                return
        self._open -= 1
        if self._keeps:
            self._answers.append(message)
        if self._open == 0:
            self._done = True

    def failed(self, error: DownpourError) -> None:
        """One of the requests will never have its answer; the first error counts."""
        if self.error is None and not self._done:
            self.error = error
            self._done = True

    def settled(self, timeout_s: float = 0.0) -> bool:
        """Whether :meth:`wait` would return or raise at once; waits at most ``timeout_s`` for that."""
        if not self._done and timeout_s > 0:
            self._attend(lambda: self._done, timeout_s)
        return self._done

    def wait(self) -> None:
        """Until all answers are there. Raises what :meth:`failed` was told; the client's deadlines see to an end."""
        while not self._done:
            self._attend(lambda: self._done, WAIT_S)
        if self.error is not None:
            raise self.error

    def answer(self) -> Request | None:
        """The next answer, in the order in which they come, for callers who go on piece by piece; None when the
        ticket has failed. Waits for it; asked for once for each request."""
        while not self._answers and self.error is None:
            self._attend(lambda: bool(self._answers) or self.error is not None, WAIT_S)
        return None if self.error is not None else self._answers.popleft()

    def result(self) -> Request:
        """The answer of a ticket for one request."""
        self.wait()
        return self._answers.popleft()

    def _attend(self, ready: Ready, timeout_s: float) -> None:
        assert self.attend is not None, "nothing has been submitted with this ticket"
        self.attend(ready, timeout_s)


@dataclass(slots=True)
class Submission:
    """A request on its way: ``awaited`` says in words what the answer will be, for error messages.

    ``repeat_s``: time without an answer after which it is sent again; 0: never. ``instead`` makes the request that
    takes its place when it is refused as ``not-staged``.
    """

    server: str
    message: Request
    ticket: Ticket
    awaited: str
    timeout_s: float
    nbytes: int = 0
    repeat_s: float = 0.0
    instead: Callable[[], Request] | None = None
    due_s: float = 0.0
    again_s: float = 0.0


class Successor(Protocol):
    """How a client goes on with a process that has taken a server's place."""

    @property
    def address(self) -> str:
        """Where it is."""

    def greet(self, pending: list[Submission]) -> list[Submission]:
        """What is said before anything else, each with a ticket of its own; ``pending`` is to follow, in this order."""

    def greeted(self, said: list[Submission]) -> None:
        """Each of these has its answer, or never will. Raises :class:`DownpourError` if nothing can follow."""

    def renewed(self, submission: Submission, again: bool) -> Submission | None:
        """``submission`` as this process understands it; None: it is dropped. ``again``: it had left before, so it
        needs another number."""


@dataclass(slots=True)
class _Server:
    name: str
    address: str
    successor: Successor | None = None
    """since the first move"""
    greeting: list[Submission] | None = None
    """whose answers all else waits for"""
    left_before: set[int] = field(default_factory=set)
    """of those that wait for the greeting: numbers of requests to the former process"""
    waiting: deque[Submission] = field(default_factory=deque)
    unanswered_bytes: int = 0
    open: int = 0
    """unanswered requests that are repeated"""
    heard: bool = False
    """whether an answer has come since its requests were repeated last"""
    repeated_s: float = 0.0

    def has_room(self, head: Submission, window_bytes: int) -> bool:
        if head.repeat_s and self.open >= MOST_OPEN:
            return False
        return not self.unanswered_bytes or self.unanswered_bytes + head.nbytes <= window_bytes

    def count(self, submission: Submission, by: int) -> None:
        """``by``: 1 when it is sent, -1 when it is not awaited any more."""
        self.unanswered_bytes += by * submission.nbytes
        self.open += by if submission.repeat_s else 0


class ClientCore:
    """See the module. A server is known by the address that it had first, wherever it moves."""

    def __init__(self, window_bytes: int) -> None:
        self._window = window_bytes
        self._servers: dict[str, _Server] = {}
        self._in_flight: dict[int, Submission] = {}
        self._again: list[Submission] = []
        self._now_s = 0.0
        self.closed: DownpourError | None = None

    def name(self, server: str, name: str) -> None:
        """Call the server at this address ``name`` in errors."""
        self._servers.setdefault(server, _Server(name, server)).name = name

    def submit(self, submission: Submission, now_s: float) -> None:
        """Take a request; it leaves with :meth:`outgoing` once there is credit."""
        if self.closed is not None:
            submission.ticket.failed(self.closed)
            return
        self._now_s = now_s
        submission.due_s = now_s + submission.timeout_s
        server = self._servers.setdefault(submission.server, _Server(submission.server, submission.server))
        if server.successor is not None and server.greeting is None:
            self._renew(server, submission, False)
        else:
            server.waiting.append(submission)

    def move(self, server: str, successor: Successor, now_s: float) -> str:
        """The server is another process now; see the module. Returns the former one's address, to be forgotten."""
        moved = self._servers.setdefault(server, _Server(server, server))
        former, moved.address, moved.successor = moved.address, successor.address, successor
        greetings = {s.message.request for s in moved.greeting or ()}
        unanswered = [s for s in self._in_flight.values() if s.server == server]
        for submission in unanswered:
            del self._in_flight[submission.message.request]
        unanswered = [s for s in unanswered if s.message.request not in greetings]
        moved.left_before.update(s.message.request for s in unanswered)
        moved.unanswered_bytes = moved.open = 0
        moved.waiting.extendleft(reversed(unanswered))
        self._now_s = now_s
        self._postpone(moved)
        moved.greeting = successor.greet(list(moved.waiting))
        for greeting in moved.greeting:
            greeting.due_s = now_s + greeting.timeout_s
            self._in_flight[greeting.message.request] = greeting
            self._again.append(greeting)
        return former

    def _postpone(self, server: _Server) -> None:
        """Deadlines begin anew."""
        for submission in server.waiting:
            submission.due_s = self._now_s + submission.timeout_s

    def _go_on(self, server: _Server) -> None:
        """The greeting has its answers: what has waited for it follows, or fails with it."""
        assert server.successor is not None
        waiting, server.waiting = server.waiting, deque()
        left_before, server.left_before = server.left_before, set()
        greeting, server.greeting = server.greeting or [], None
        try:
            server.successor.greeted(greeting)
        except DownpourError as error:
            for submission in waiting:
                submission.ticket.failed(error)
            return
        for submission in waiting:
            self._renew(server, submission, submission.message.request in left_before)
        self._postpone(server)

    def _renew(self, server: _Server, submission: Submission, again: bool) -> None:
        assert server.successor is not None
        renewed = server.successor.renewed(submission, again)
        if renewed is not None:
            server.waiting.append(renewed)
        else:
            submission.ticket.failed(PeerError(server.name, f"{server.name} is another process now"))

    @property
    def pressing(self) -> bool:
        """Whether requests wait for answers to others before they may leave."""
        return any(server.waiting and server.greeting is None for server in self._servers.values())

    def outgoing(self) -> list[tuple[str, Message]]:
        """The messages to send now, in order."""
        again = [s for s in self._again if s.message.request in self._in_flight]
        sends: list[tuple[str, Message]] = [(self._servers[s.server].address, s.message) for s in again]
        self._again.clear()
        for server in self._servers.values():
            if server.greeting is not None:
                if not all(s.ticket.settled() for s in server.greeting):
                    continue
                self._go_on(server)
            while server.waiting:
                head = server.waiting[0]
                if not server.has_room(head, self._window):
                    break
                server.waiting.popleft()
                server.count(head, 1)
                head.again_s = self._now_s + head.repeat_s
                self._in_flight[head.message.request] = head
                sends.append((server.address, head.message))
        return sends

    def received(self, message: Request) -> None:
        """An answer has come; one that nobody waits for (a repeat, or too late) is ignored."""
        submission = self._in_flight.pop(message.request, None)
        if submission is None:
            return
        server = self._servers[submission.server]
        server.count(submission, -1)
        server.heard = True
        if isinstance(message, m.Refused) and message.code == Refusal.NOT_STAGED and submission.instead is not None:
            if isinstance(submission.message, m.PushPullStaged):
                self._lost(submission.message.stage)
            # At once and without credit: what has taken the credit may wait for other workers, and they for this.
            again = replace(submission, message=submission.instead(), nbytes=0, instead=None)
            self._in_flight[again.message.request] = again
            self._again.append(again)
        elif isinstance(message, m.Refused):
            submission.ticket.failed(_refusal(server.name, submission, message))
        else:
            submission.ticket.answered(message)

    def _lost(self, number: int) -> None:
        """A request that had no answer before a later one to its shard has one: it or its answer was lost."""
        submission = self._in_flight.pop(number, None)
        if submission is not None:
            self._servers[submission.server].count(submission, -1)

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for this any more: it is not repeated, and what has not left does not leave."""
        for number in [n for n, s in self._in_flight.items() if s.ticket is ticket]:
            submission = self._in_flight.pop(number)
            self._servers[submission.server].count(submission, -1)
        for server in self._servers.values():
            server.waiting = deque(s for s in server.waiting if s.ticket is not ticket)

    def tick(self, now_s: float) -> None:
        """Fail what is overdue, repeat what has waited for long."""
        self._now_s = now_s
        overdue = [s for s in self._in_flight.values() if now_s > s.due_s]
        for submission in overdue:
            del self._in_flight[submission.message.request]
            self._servers[submission.server].count(submission, -1)
            self._time_out(submission)
        for server in self._servers.values():
            late = [s for s in server.waiting if now_s > s.due_s]
            if late:
                server.waiting = deque(s for s in server.waiting if now_s <= s.due_s)
            for submission in late:
                self._time_out(submission)
        self._repeat(now_s)

    def _repeat(self, now_s: float) -> None:
        waiting: dict[str, list[Submission]] = {}
        for submission in self._in_flight.values():
            if submission.repeat_s and now_s >= submission.again_s:
                waiting.setdefault(submission.server, []).append(submission)
        for address, late in waiting.items():
            server = self._servers[address]
            if not server.heard and now_s - server.repeated_s < late[0].repeat_s:
                continue
            due = late if server.heard else [min(late, key=lambda s: s.again_s)]
            server.heard, server.repeated_s = False, now_s
            for submission in due:
                submission.again_s = now_s + submission.repeat_s
            self._again += due

    def _time_out(self, submission: Submission) -> None:
        name = self._servers[submission.server].name
        submission.ticket.failed(PeerTimeout(name, submission.awaited, submission.timeout_s))

    def close(self, error: DownpourError) -> None:
        """Fail everything under way, and whatever comes later."""
        self.closed = error
        waiting = [s for server in self._servers.values() for s in server.waiting]
        for submission in [*self._in_flight.values(), *waiting]:
            submission.ticket.failed(error)
        self._in_flight.clear()
        self._again.clear()
        for server in self._servers.values():
            server.waiting.clear()


def _refusal(name: str, submission: Submission, refused: m.Refused) -> DownpourError:
    if refused.code == Refusal.NON_FINITE:
        return NonFiniteContribution(f"{name}: {refused.reason}")
    if refused.code == Refusal.TIMED_OUT:
        error = PeerTimeout(name, submission.awaited, submission.timeout_s)
        error.args = (f"{name}: {refused.reason} (awaited: {submission.awaited})",)
        return error
    if refused.code == Refusal.STALE_EPOCH:
        reason = f"{refused.reason}; this process takes no part in the job any more and must end"
        return PeerRefused(name, refused.code, reason)
    return PeerRefused(name, refused.code, refused.reason)
