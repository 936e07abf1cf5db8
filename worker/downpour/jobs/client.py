"""A blocking conversation with a coordinator, which may be restarted meanwhile."""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, TypeVar

from downpour.jobs.access import Access, access
from downpour.jobs.errors import ClusterError, CoordinatorUnreachable, Forbidden, JobRefused, Unknown
from downpour.jobs.exchange import Exchange
from downpour_common.errors import ProtocolError
from downpour_common.messages import (
    CancelJob,
    CheckpointNow,
    DescribeJob,
    Document,
    DrainNode,
    GetFile,
    ListFiles,
    ListJobs,
    ListNodes,
    Message,
    Refusal,
    Refused,
    Reply,
    Request,
    ScaleJob,
    SetJob,
)
from downpour_common.transport import ClientTransport

TIMEOUT_S = 10.0
"""How long a user waits for an answer, unless told otherwise."""
OUTAGE_S = 600.0
"""How long who follows a job waits for a coordinator that is away."""
RECONNECT_S = 10.0
"""Silence after which a connection is made anew: the host's address may have changed, or a middlebox forgot us."""
IN_FLIGHT = 8
"""Requests that are open at once where the order of their work does not matter."""
TROUBLE_S = 1.0
"""A connection that is refused for this long is refused for good: one that breaks while the coordinator starts or ends
can look the same for a moment."""
_LOOK_S = 0.25

Answer = TypeVar("Answer", bound=Message)


class WatchedTransport(ClientTransport, Protocol):
    """A transport that can tell what is wrong with a connection."""

    def trouble(self, server: str) -> str:
        """``""``, ``refused`` (our key), ``unreachable`` or ``wrong-server-key``."""


class ClusterClient:
    """Asks a coordinator; one thread. ``join``, ``keys`` and ``security`` as in :func:`downpour.jobs.access.access`.

    ``timeout_s``: silence after which :class:`CoordinatorUnreachable` is raised. Every method also raises
    :class:`Forbidden`, :class:`Unknown` and :class:`JobRefused`.
    """

    def __init__(
        self,
        join: str | None = None,
        keys: str | os.PathLike[str] | None = None,
        security: str | None = None,
        timeout_s: float = TIMEOUT_S,
        *,
        connect: Callable[[Access], WatchedTransport] | None = None,
        now: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.access = access(join, keys, security)
        self.address = self.access.address
        self.timeout_s = timeout_s
        self.on_silence: Callable[[float], None] | None = None
        """Called a few times per second with the seconds since the last answer, while there is none."""
        self._connect = connect or _connect
        self.now, self.pause = now, pause
        """The clock in seconds, and how to let it go on."""
        self._transport = self._connect(self.access)
        self._connected_s = now()
        self._trouble, self._trouble_since_s = "", now()
        self._exchange = Exchange(secrets.randbits(61))

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up."""
        self._transport.close()

    # ------------------------------------------------------------ any request

    def ask(self, answer: type[Answer], request: type[Request], *fields: Any) -> Answer:
        """Send ``request(number, *fields)`` and wait for its answer, which is of type ``answer``."""
        return next(self.ask_all(answer, [(request, *fields)]))

    def ask_all(self, answer: type[Answer], requests: Iterable[tuple[Any, ...]]) -> Iterator[Answer]:
        """As :meth:`ask` for ``(request, *fields)``, several in flight; answers in the order of the requests.

        Nothing else may be asked until the iterator is used up or closed.
        """
        todo = iter(requests)
        order: deque[Request] = deque()
        answers: dict[int, Message] = {}
        try:
            while True:
                while len(order) < IN_FLIGHT and (entry := next(todo, None)) is not None:
                    kind, *fields = entry
                    order.append(kind(self._exchange.number(), *fields))
                    self._exchange.add(order[-1], self.now())
                if not order:
                    return
                while order[0].request not in answers:
                    answers.update(self._step())
                request = order.popleft()
                yield _expect(answer, answers.pop(request.request), request)
        finally:
            self._exchange.drop()

    def _step(self) -> dict[int, Message]:
        """Send what is due and look once for answers."""
        exchange, transport = self._exchange, self._transport
        for request in exchange.due(self.now()):
            transport.send(self.address, request)
        arrived = transport.poll(min(_LOOK_S, exchange.wait_s(self.now())))
        now_s = self.now()
        closed: dict[int, Message] = {}
        for _, message in arrived:
            request_closed = exchange.take(message, now_s)
            if request_closed is None:
                continue
            if isinstance(message, Refused) and message.code == Refusal.NOT_READY and not _matters_now(request_closed):
                exchange.again(request_closed, now_s)
            else:
                closed[request_closed.request] = message
        if not closed:
            self._look_for_trouble(now_s)
        return closed

    def _look_for_trouble(self, now_s: float) -> None:
        trouble = self._transport.trouble(self.address)
        if trouble != self._trouble:
            self._trouble, self._trouble_since_s = trouble, now_s
        if now_s - self._trouble_since_s >= TROUBLE_S:
            if trouble == "refused":
                raise Forbidden(_refused_key(self.access))
            if trouble == "wrong-server-key":
                raise Forbidden(_wrong_key(self.access))
        silent_s = self._exchange.silent_s(now_s)
        if silent_s >= self.timeout_s:
            raise CoordinatorUnreachable(self.address, silent_s, trouble != "unreachable")
        if self.on_silence is not None and silent_s > 0:
            self.on_silence(silent_s)
        if min(silent_s, now_s - self._connected_s) >= RECONNECT_S:
            self._transport.close()
            self._transport = self._connect(self.access)
            self._connected_s = now_s
            self._exchange.resend()

    # ------------------------------------------------------------ what users ask

    def jobs(self) -> list[Document]:
        """Job documents without their long parts, newest first."""
        return list(self.ask(Reply, ListJobs).document.get("jobs", []))

    def describe(self, job: str) -> Document:
        """The whole job document. ``job``: id, unambiguous beginning, or name (its newest)."""
        return self.ask(Reply, DescribeJob, job).document

    def cancel(self, job: str) -> Document:
        """End the job; returns at once."""
        return self.ask(Reply, CancelJob, job).document

    def scale(self, job: str, workers: int) -> Document:
        """Have ``workers`` workers from now on; returns at once."""
        return self.ask(Reply, ScaleJob, job, workers).document

    def checkpoint_now(self, job: str, token: str) -> Document:
        """Have a checkpoint begin now, once per ``token``; returns at once how far it is (``state``, ``number``)."""
        return self.ask(Reply, CheckpointNow, job, token).document

    def set(self, job: str, token: str, assignments: tuple[str, ...]) -> Document:
        """Have the job go on with these ``key=value``, once per ``token``; returns at once how far it is."""
        return self.ask(Reply, SetJob, job, token, assignments).document

    def nodes(self) -> Document:
        """``{"nodes": [node document, …], "coordinator": {…}}``."""
        return self.ask(Reply, ListNodes).document

    def drain(self, node: str, undo: bool = False) -> Document:
        """Use ``node`` no more (or again); its document."""
        return self.ask(Reply, DrainNode, node, undo).document

    def files(self, job: str) -> list[tuple[str, int]]:
        """Paths and sizes in bytes of the job's files at the coordinator."""
        document = self.ask(Reply, ListFiles, job).document
        try:
            return [(str(path), int(size)) for path, size in document["files"]]
        except (KeyError, TypeError, ValueError):
            raise ProtocolError("the coordinator's answer to ListFiles is malformed") from None


def _connect(where: Access) -> WatchedTransport:
    from downpour_common import wire
    from downpour_common.transport.zeromq import ZmqClient

    return ZmqClient(wire.CONTROL_HEADER_LIMIT, where.keys(), watch=True)


def _matters_now(request: Request) -> bool:
    """Whether ``not-ready`` is an answer to act on rather than to wait out."""
    from downpour_common.messages import SubmitJob

    return isinstance(request, SubmitJob)


def _expect(kind: type[Answer], message: Message, request: Request) -> Answer:
    if isinstance(message, Refused):
        raise _refusal(message, request)
    if not isinstance(message, kind):
        raise ProtocolError(f"the coordinator answered {type(request).__name__} with {type(message).__name__}")
    return message


def _refusal(message: Refused, request: Request) -> ClusterError:
    if message.code == Refusal.FORBIDDEN:
        return Forbidden(message.reason or "this key does not allow that")
    if message.code == Refusal.UNKNOWN:
        if isinstance(request, DrainNode):
            return Unknown("node", request.node, message.reason, "`downpour nodes` lists them")
        if isinstance(request, GetFile):
            return Unknown("file", request.path, message.reason, "")
        return Unknown("job", getattr(request, "job", ""), message.reason, "`downpour list` shows the jobs")
    return JobRefused(message.code, message.reason)


def _refused_key(where: Access) -> str:
    if where.keys_dir is None:
        return (
            f"the coordinator at {where.address.removeprefix('tcp://')} asks for a key; "
            "give --keys FOLDER, or set DOWNPOUR_KEYS"
        )
    return (
        f"the coordinator does not accept the key {where.key_file()}; have its administrator authorize the public key "
        "beside it, or give other keys with --keys"
    )


def _wrong_key(where: Access) -> str:
    if where.keys_dir is None:
        return _refused_key(where)
    return (
        f"what listens at {where.address.removeprefix('tcp://')} cannot prove to have the key "
        f"{where.keys_dir}/coordinator.pub: it is another coordinator, its keys are new (copy its coordinator.pub), "
        "or it runs without keys (--security none)"
    )
