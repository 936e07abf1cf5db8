"""The client's loop: a thin one around :class:`ClientCore` and a transport, run by one thread at a time.

Whoever has the *turn* owns core and sockets. A thread of its own has it by default, so that the worker is heard and
hears while the script computes. A thread that waits for answers takes the turn and runs the loop itself, because each
handing over between threads costs more than a small message does. The turn then goes back when nobody has waited for
:data:`PARK_S`, or at once when requests wait for credit.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from downpour.client.core import REPEAT_S, ClientCore, OnAnswer, Ready, Submission, Successor, Ticket
from downpour.client.shield import Shield
from downpour_common.errors import DownpourError, PeerError
from downpour_common.messages import Message, Request
from downpour_common.transport import ClientTransport

TICK_S = 0.25
LOOK_S = 0.1
"""How often a wait that may be left looks whether it is to be."""
PARK_S = 0.02
"""How long the client's own thread stays away after another one had the turn."""
SWITCH_S = 5e-4
"""While a thread waits for answers, other Python threads give the interpreter back after so long: each answer would
otherwise wait for up to Python's 5 ms beside a thread that computes."""
DEADLINE_MARGIN_S = 5.0
"""The shard's own deadline comes first, because it knows whom the answer is waiting for."""


class _Wish:
    """A thread's wish for the turn. ``look`` tells it to look whether it may have it, or needs it no longer."""

    __slots__ = ("look", "ready")

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.look = threading.Event()


_Item = Submission | tuple[str, Message] | Callable[[], None]


class ClientThread:
    """Sends requests and settles tickets until closed. ``on_notice`` gets messages that answer nothing."""

    def __init__(self, transport: ClientTransport, window_bytes: int, on_notice: Callable[[Message], None]) -> None:
        self._transport = transport
        self._core = ClientCore(window_bytes)
        self._on_notice = on_notice
        self._inbox: deque[_Item] = deque()
        self._numbers = itertools.count(1)
        self._standing: tuple[str, Message] | None = None
        self._said_s = 0.0
        self._ticked_s = time.monotonic()
        self._turn = threading.Lock()
        self._wanted: list[_Wish] = []
        """of the threads that wait for the turn"""
        self._process = os.getpid()
        self._left_s = 0.0
        self._resume = threading.Event()
        self._closing = threading.Event()
        self._error: DownpourError | None = None
        """why nothing is sent any more"""
        self._thread = threading.Thread(target=self._run, name="downpour-io", daemon=True)
        self._thread.start()

    def number(self) -> int:
        """A fresh request number."""
        return next(self._numbers)

    def name(self, server: str, name: str) -> None:
        """Call the server at this address ``name`` in errors."""
        self._put(lambda: self._core.name(server, name))

    def move(self, server: str, find: Callable[[], Successor | None]) -> None:
        """The server, known by its first address, is another process now. ``find`` is called where answers are
        received, and may find that it is not."""

        def carry_out() -> None:
            successor = None if self._error else find()
            if successor is not None:
                self._transport.forget(self._core.move(server, successor, time.monotonic()))

        self._put(carry_out)

    def submit(self, submissions: list[Submission]) -> None:
        """Send requests; each settles its ticket. What has credit is handed to the transport before this returns,
        unless another thread has the turn, which then does so."""
        for submission in submissions:
            submission.ticket.attend = self.attend
        self._put(*submissions)

    def ask(self, server: str, message: Request, awaited: str, timeout_s: float) -> Request:
        """Send one request and wait for its answer. Raises :class:`DownpourError`."""
        ticket = Ticket(1)
        self.submit([Submission(server, message, ticket, awaited, timeout_s)])
        return ticket.result()

    def ask_all(
        self,
        requests: list[tuple[str, Request]],
        awaited: str,
        timeout_s: float,
        on_answer: OnAnswer | None = None,
        leave_point: Callable[[], None] | None = None,
    ) -> None:
        """Send several requests and wait for all answers; ``leave_point`` as in :meth:`wait`.

        Raises :class:`DownpourError`.
        """
        ticket = Ticket(len(requests), on_answer)
        self.submit([Submission(server, message, ticket, awaited, timeout_s) for server, message in requests])
        if leave_point is not None:
            self.wait(ticket, leave_point)
        ticket.wait()

    def wait(self, ticket: Ticket, leave_point: Callable[[], None]) -> None:
        """Until the ticket is settled; ``leave_point`` is called now and then, and the wait given up if it raises."""
        try:
            while not ticket.settled(LOOK_S):
                leave_point()
        except BaseException:
            self._put(lambda: self._core.abandon(ticket))
            raise

    def keep_telling(self, server: str, message: Message) -> None:
        """As :meth:`tell`, and again every :data:`REPEAT_S` until there is something newer to say.

        From it a restarted server learns where this client can be reached.
        """

        def say() -> None:
            self._standing = (server, message)
            self._say()

        self._put(say)

    def tell(self, server: str, message: Message) -> None:
        """Send a message that has no answer."""
        self._put((server, message))

    def close(self) -> None:
        """Send what is queued, then end the thread and close the sockets."""
        self._closing.set()
        self._resume.set()
        self._transport.wake()
        self._thread.join(timeout=10.0)

    # ------------------------------------------------------------ the turn

    def attend(self, ready: Ready, timeout_s: float) -> None:
        """Take the turn, and go on until ``ready()`` or for at most ``timeout_s``.

        Raises :class:`PeerError` in a fork of the worker, where nobody would ever answer.
        """
        if os.getpid() != self._process:
            raise PeerError("worker", "has been forked, and only the process that joined the job can talk to it")
        if self._closing.is_set():
            self._thread.join(timeout_s)  # it fails whatever is still awaited, for which it needs the turn
            return
        until_s = time.monotonic() + timeout_s
        with Shield() as shield:
            if not self._take_turn(ready, until_s):
                return
            usual_s = sys.getswitchinterval()
            sys.setswitchinterval(min(usual_s, SWITCH_S))
            try:
                while not (ready() or shield.struck or self._closing.is_set()):
                    left_s = until_s - time.monotonic()
                    if left_s <= 0:
                        break
                    self._turn_once(min(left_s, TICK_S))
                    self._tell_the_others()
            except Exception as problem:
                self._fail(_broken(problem))
            except BaseException as problem:  # a signal handler of the script's, between any two instructions
                self._fail(_interrupted(problem))
                raise
            finally:
                sys.setswitchinterval(usual_s)
                self._left_s = time.monotonic()
                self._give_turn()

    def _take_turn(self, ready: Ready, until_s: float) -> bool:
        """Whether it is had; not if ``ready()`` first, because others receive for everybody."""
        if self._turn.acquire(blocking=False):
            return True
        wish = _Wish(ready)
        self._wanted.append(wish)
        try:
            self._transport.wake()
            while not (ready() or self._closing.is_set()):
                if self._turn.acquire(blocking=False):
                    return True
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                wish.look.wait(left_s)
                wish.look.clear()
            return False
        finally:
            self._wanted.remove(wish)

    def _tell_the_others(self) -> None:
        """That they have what they wait for."""
        for wish in self._wanted.copy():
            if wish.ready():
                wish.look.set()

    def _release_turn(self) -> None:
        self._turn.release()
        for wish in self._wanted.copy():
            wish.look.set()

    def _give_turn(self) -> None:
        """What others have put into the inbox meanwhile leaves first: they rely on whoever had the turn."""
        pressing = self._core.pressing
        self._release_turn()
        while self._inbox and self._turn.acquire(blocking=False):
            self._try_to_send()
            pressing = self._core.pressing
            self._release_turn()
        if pressing:
            self._resume.set()

    def _put(self, *items: _Item) -> None:
        with Shield():
            self._inbox.extend(items)
            if self._turn.acquire(blocking=False):
                try:
                    self._try_to_send()
                finally:
                    self._give_turn()
            else:
                self._transport.wake()

    def _run(self) -> None:
        """The client's own thread."""
        while not (self._closing.is_set() or self._error):
            self._turn.acquire()
            try:
                while not (self._wanted or self._closing.is_set() or self._error):
                    self._turn_once(TICK_S)
            except Exception as problem:
                self._fail(_broken(problem))
            finally:
                self._release_turn()
            self._park()
        self._turn.acquire()
        try:
            self._try_to_send()
            self._fail(PeerError("worker", "the connection to the servers is closed"))
            self._transport.close()
        finally:
            self._give_turn()  # what another thread has put into the inbox meanwhile must fail, too

    def _park(self) -> None:
        """Stay away from the turn until it is of use."""
        while not (self._closing.is_set() or self._error):
            if self._resume.wait(PARK_S):
                self._resume.clear()
                return
            if not self._wanted and not self._turn.locked() and time.monotonic() - self._left_s >= PARK_S:
                return

    # ------------------------------------------------------------ with the turn

    def _turn_once(self, timeout_s: float) -> None:
        self._send()
        for _, message in self._transport.poll(timeout_s):
            if isinstance(message, Request):
                self._core.received(message)
            else:
                self._on_notice(message)
        now_s = time.monotonic()
        if now_s - self._ticked_s >= TICK_S:
            self._ticked_s = now_s
            self._core.tick(now_s)
            if now_s - self._said_s >= REPEAT_S:
                self._say()

    def _try_to_send(self) -> None:
        """For threads with business of their own: what goes wrong fails the tickets, not them."""
        try:
            self._send()
        except Exception as problem:
            self._fail(_broken(problem))
        except BaseException as problem:
            self._fail(_interrupted(problem))
            raise

    def _send(self) -> None:
        """Take what the inbox holds; what has credit leaves. Once closed, the core refuses each."""
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Submission):
                self._core.submit(item, time.monotonic())
            elif callable(item):
                item()
            elif not self._error:
                self._transport.send(*item)
        for server, message in self._core.outgoing():
            self._transport.send(server, message)

    def _say(self) -> None:
        if self._standing is not None and not self._error:
            self._transport.send(*self._standing)
            self._said_s = time.monotonic()

    def _fail(self, error: DownpourError) -> None:
        """Everything under way fails, and whatever comes later; the first error counts."""
        if self._error is None:
            self._error = error
            self._core.close(error)
            self._closing.set()
            self._resume.set()


def _broken(problem: Exception) -> DownpourError:
    return PeerError("worker", f"the communication thread failed: {type(problem).__name__}: {problem}")


def _interrupted(problem: BaseException) -> DownpourError:
    return PeerError("worker", f"was interrupted in a message by {type(problem).__name__}")
