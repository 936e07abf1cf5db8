"""The thread that owns the sockets: a thin loop around :class:`ClientCore` and a transport.

The training thread hands requests over a queue and waits on tickets; sockets never cross threads.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

from downpour.client.core import REPEAT_S, ClientCore, OnAnswer, Submission, Ticket
from downpour_common.errors import DownpourError, PeerError
from downpour_common.messages import Message, Request
from downpour_common.transport import ClientTransport

TICK_S = 0.25
LOOK_S = 0.1
"""How often a wait that may be left looks whether it is to be."""
DEADLINE_MARGIN_S = 5.0
"""The shard's own deadline comes first, because it knows whom the answer is waiting for."""


class ClientThread:
    """Sends requests and settles tickets until closed. ``on_notice`` gets messages that answer nothing."""

    def __init__(self, transport: ClientTransport, window_bytes: int, on_notice: Callable[[Message], None]) -> None:
        self._transport = transport
        self._core = ClientCore(window_bytes)
        self._on_notice = on_notice
        self._inbox: deque[Submission | tuple[str, Message] | Callable[[], None]] = deque()
        self._numbers = itertools.count(1)
        self._standing: tuple[str, Message] | None = None
        self._said_s = 0.0
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="downpour-io", daemon=True)
        self._thread.start()

    def number(self) -> int:
        """A fresh request number."""
        return next(self._numbers)

    def name(self, server: str, name: str) -> None:
        """Call the server at this address ``name`` in errors."""
        self._put(lambda: self._core.name(server, name))

    def submit(self, submissions: list[Submission]) -> None:
        """Send requests; each settles its ticket."""
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

    def _say(self) -> None:
        if self._standing is not None and not self._ended.is_set():
            self._transport.send(*self._standing)
            self._said_s = time.monotonic()

    def tell(self, server: str, message: Message) -> None:
        """Send a message that has no answer."""
        self._put((server, message))

    def close(self) -> None:
        """Send what is queued, then end the thread and close the sockets."""
        self._closing.set()
        self._transport.wake()
        self._thread.join(timeout=10.0)

    def _put(self, *items: Submission | tuple[str, Message] | Callable[[], None]) -> None:
        self._inbox.extend(items)
        if self._ended.is_set():  # nobody else will look; the closed core refuses each
            self._take_inbox()
        else:
            self._transport.wake()

    def _run(self) -> None:
        last_tick_s = time.monotonic()
        error: DownpourError = PeerError("worker", "the connection to the servers is closed")
        try:
            while True:
                closing = self._closing.is_set()
                self._take_inbox()
                for server, message in self._core.outgoing():
                    self._transport.send(server, message)
                if closing and not self._inbox:
                    break
                for _, message in self._transport.poll(TICK_S):
                    if isinstance(message, Request):
                        self._core.received(message)
                    else:
                        self._on_notice(message)
                now_s = time.monotonic()
                if now_s - last_tick_s >= TICK_S:
                    last_tick_s = now_s
                    self._core.tick(now_s)
                    if now_s - self._said_s >= REPEAT_S:
                        self._say()
        except Exception as problem:
            error = PeerError("worker", f"the communication thread failed: {type(problem).__name__}: {problem}")
            raise
        finally:
            self._core.close(error)
            self._ended.set()
            self._take_inbox()
            self._transport.close()

    def _take_inbox(self) -> None:
        while True:
            try:
                item = self._inbox.popleft()
            except IndexError:
                return
            if isinstance(item, Submission):
                self._core.submit(item, time.monotonic())
            elif callable(item):
                item()
            elif not self._ended.is_set():
                self._transport.send(*item)
