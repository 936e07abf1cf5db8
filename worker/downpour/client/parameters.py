"""Push and pull of chunks: the lower-level client for loops of any shape (reinforcement learning, custom rules)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from downpour.client.ahead import Ahead
from downpour.client.core import OnAnswer, Submission, Ticket
from downpour.client.thread import DEADLINE_MARGIN_S, ClientThread
from downpour.context import WorkerContext
from downpour_common import messages as m
from downpour_common.errors import PeerRefused, ProtocolError
from downpour_common.layout import Chunk, Layout
from downpour_common.messages import Request
from downpour_common.sharing import OfferedMemory


class Memory(Protocol):
    """Host memory of the chunks on the worker's side, ``chunk.nbytes`` bytes each."""

    def weights(self, chunk: Chunk) -> memoryview:
        """Where the chunk's weights go."""

    def gradient(self, chunk: Chunk) -> memoryview:
        """What a push of the chunk sends; unchanged until the push is answered."""

    def digest(self, chunk: Chunk) -> bytes:
        """The digest of :meth:`gradient`; empty where what was sent of it before cannot have changed since."""


@dataclass(slots=True)
class Traffic:
    """Payload bytes that this worker has moved."""

    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class PushHeader:
    """What all chunks of one push have in common."""

    seq: int
    samples: int
    position: tuple[int, ...]
    hyper: Sequence[bytes]
    """by parameter group: options in force, packed"""


class ParameterClient:
    """Talks to the shards of one job. Chunks go to their shards; base versions are kept per chunk.

    Every call raises :class:`downpour_common.errors.DownpourError`: :class:`PeerTimeout` past the deadline,
    :class:`NonFiniteContribution` for NaN or Inf, :class:`PeerRefused` otherwise.
    """

    def __init__(
        self,
        thread: ClientThread,
        context: WorkerContext,
        layout: Layout,
        shards: Sequence[str],
        memory: Memory,
    ) -> None:
        self.traffic = Traffic()
        self.ahead = Ahead()
        self._thread = thread
        self._context = context
        self._layout = layout
        self._shards = shards
        self._memory = memory
        self._epochs = [0] * len(shards)
        self._attached = [False] * len(shards)
        self._versions = self._base = [0] * len(layout.chunks)
        self._bounded = context.parsed_mode.name == "ssp"
        self._first_seq = 0
        self._timeout_s = context.timeout_s + DEADLINE_MARGIN_S
        for index, address in enumerate(shards):
            thread.name(address, f"server/{index}")

    def hello(self) -> int:
        """Introduce this worker to every shard; they refuse a model of another layout.

        Returns the number of this worker's first contribution: the largest that a shard names, and the same on all,
        see :mod:`downpour_server.policy.stale`.
        """
        c = self._context
        first = [0]

        def on_answer(message: Request) -> None:
            assert isinstance(message, m.HelloReply)
            self._epochs[message.shard] = message.shard_epoch
            first.append(message.clock)

        self._everywhere(
            lambda number: m.Hello(number, c.job, c.slot, c.worker_epoch, self._layout.digest),
            "greeting",
            on_answer,
        )
        self._first_seq = max(first)
        return self._first_seq

    def share(self, offered: OfferedMemory, in_place: bool) -> None:
        """Offer the shards this worker's memory; from then on, push-pulls of its gradients send headers only.

        ``in_place``: the shards may keep their weights in it while there is no other worker; no pull may be open then.
        A shard that cannot map it is served as before.
        """
        c = self._context
        for index, address in enumerate(self._shards):
            attach = m.AttachMemory(
                self._thread.number(), c.job, c.slot, c.worker_epoch, os.getpid(), offered.fd, offered.nonce, in_place
            )
            try:
                self._thread.ask(address, attach, "shared memory to be mapped", self._timeout_s)
            except PeerRefused:
                continue
            self._attached[index] = True
        offered.close_fd()

    def initialise(self, chunks: Iterable[Chunk]) -> None:
        """Send the job's first weights."""
        c = self._context
        chunks = list(chunks)
        ticket = Ticket(len(chunks))
        self._thread.submit(
            [
                self._submission(
                    chunk,
                    m.Init(
                        self._thread.number(),
                        c.job,
                        c.slot,
                        c.worker_epoch,
                        chunk.index,
                        self._memory.weights(chunk),
                    ),
                    ticket,
                    f"initial weights of chunk {chunk.index} to be taken",
                )
                for chunk in chunks
            ]
        )
        ticket.wait()

    def pull(self, chunks: Iterable[Chunk]) -> None:
        """Fetch the newest weights into memory; waits for the first ones if need be."""
        self.start_pull(chunks).wait()

    def start_pull(self, chunks: Iterable[Chunk], piecewise: bool = False) -> Ticket:
        """As :meth:`pull`, without waiting; ``piecewise``: the ticket's answers are the chunks' :class:`Weights`."""
        c = self._context
        chunks = list(chunks)
        ticket = Ticket(len(chunks), self._take_weights, piecewise)
        self._thread.submit(
            [
                self._submission(
                    chunk,
                    m.Pull(self._thread.number(), c.job, c.slot, c.worker_epoch, chunk.index),
                    ticket,
                    f"weights of chunk {chunk.index}",
                )
                for chunk in chunks
            ]
        )
        return ticket

    def push(self, chunks: Iterable[Chunk], header: PushHeader) -> None:
        """Send contributions and wait until they are accepted."""
        chunks = list(chunks)
        ticket = Ticket(len(chunks))
        self._thread.submit(
            [
                self._contribution(chunk, m.Push(*self._head(chunk, header), self._memory.gradient(chunk)), ticket)
                for chunk in chunks
            ]
        )
        ticket.wait()

    def fetched(self) -> list[int]:
        """The versions of the weights that have been fetched last, by chunk."""
        return list(self._versions)

    def compute_on(self, versions: list[int]) -> None:
        """What is pushed from now on was computed on these versions, by chunk; until then, on those fetched last."""
        self._base = versions

    def sends(self, chunk: Chunk) -> bool:
        """Whether the chunk's contributions travel as payloads."""
        return not self._attached[chunk.shard]

    def stage(self, chunks: Iterable[Chunk]) -> None:
        """Send chunks' gradients ahead of the push-pull that is to come. Their memory may change meanwhile."""
        c = self._context
        submissions = []
        for chunk in chunks:
            number, answer = self._thread.number(), Ticket(1)
            payload = self._memory.gradient(chunk)
            stage = m.Stage(number, c.job, c.slot, c.worker_epoch, chunk.index, payload)
            self.traffic.bytes_sent += payload.nbytes
            self.ahead.note(chunk.index, number, answer)
            submissions.append(self._submission(chunk, stage, answer, f"chunk {chunk.index} to be kept"))
        if submissions:
            self._thread.submit(submissions)

    def begin_push_pull(self, count: int, piecewise: bool = False) -> Ticket:
        """A ticket for ``count`` chunks that are pushed and fetched with :meth:`add_push_pull`, some at a time.

        ``piecewise`` as in :meth:`start_pull`.
        """
        return Ticket(count, self._take_weights, piecewise)

    def add_push_pull(self, chunks: Iterable[Chunk], header: PushHeader, ticket: Ticket) -> None:
        """Send chunks' contributions; their new weights come with the answers."""
        self._thread.submit([self._push_pull(chunk, header, ticket) for chunk in chunks])

    def end_epoch(self, leave_point: Callable[[], None]) -> None:
        """No more contributions until every live worker says the same; returns then. See :meth:`ClientThread.wait`."""
        c = self._context
        self._everywhere(
            lambda number: m.EndEpoch(number, c.job, c.slot, c.worker_epoch),
            "the end of the epoch in all other workers",
            leave_point=leave_point,
        )

    def leave(self) -> None:
        """No more contributions, ever."""
        c = self._context
        self._everywhere(lambda number: m.Leave(number, c.job, c.slot, c.worker_epoch), "leave to be noted")

    def _everywhere(
        self,
        make: Callable[[int], Request],
        awaited: str,
        on_answer: OnAnswer | None = None,
        leave_point: Callable[[], None] | None = None,
    ) -> None:
        """One request to every shard, made with its number; waits for all answers."""
        requests = [(address, make(self._thread.number())) for address in self._shards]
        self._thread.ask_all(requests, awaited, self._timeout_s, on_answer, leave_point)

    def _push_pull(self, chunk: Chunk, header: PushHeader, ticket: Ticket) -> Submission:
        head = self._head(chunk, header)
        if self._attached[chunk.shard]:
            return self._contribution(chunk, m.PushPullShared(*head), ticket)
        if self.ahead.holds(chunk.index):
            digest = self._memory.digest(chunk)
            stage = self.ahead.take(chunk.index, digest)
            if stage >= 0:
                submission = self._contribution(chunk, m.PushPullStaged(*head, stage, digest), ticket)
                submission.instead = partial(self._not_staged, chunk, header)
                return submission
        return self._contribution(chunk, m.PushPull(*head, self._memory.gradient(chunk)), ticket)

    def _not_staged(self, chunk: Chunk, header: PushHeader) -> m.PushPull:
        """While answers are received: what is sent in place of a push-pull whose payload the shard does not hold."""
        self.ahead.refused()
        payload = self._memory.gradient(chunk)
        self.traffic.bytes_sent += payload.nbytes
        return m.PushPull(*self._head(chunk, header), payload)

    def _head(
        self, chunk: Chunk, header: PushHeader
    ) -> tuple[int, str, int, int, int, int, int, int, int, tuple[int, ...], bytes]:
        """The fields of :class:`m.Contribution`, in order."""
        c = self._context
        return (
            self._thread.number(),
            c.job,
            self._epochs[chunk.shard],
            c.slot,
            c.worker_epoch,
            header.seq,
            self._base[chunk.index],
            chunk.index,
            header.samples,
            header.position,
            header.hyper[chunk.group] if chunk.group >= 0 else b"",
        )

    def _contribution(self, chunk: Chunk, message: m.Contribution, ticket: Ticket) -> Submission:
        match message:
            case m.Push(payload=payload) | m.PushPull(payload=payload):
                self.traffic.bytes_sent += memoryview(payload).nbytes
            case m.PushPullShared():
                self.traffic.bytes_sent += chunk.nbytes
        awaited = f"answer to push {message.seq} of chunk {chunk.index}"
        # The first one must not wait for credit in ssp, see downpour_server.policy.stale.
        free = self._bounded and message.seq == self._first_seq
        return self._submission(chunk, message, ticket, awaited, not free and not isinstance(message, m.PushPullShared))

    def _submission(
        self, chunk: Chunk, message: Request, ticket: Ticket, awaited: str, counted: bool = True
    ) -> Submission:
        """``counted``: the chunk itself is sent or comes back, and counts against the credit."""
        nbytes = chunk.nbytes if counted else 0
        return Submission(self._shards[chunk.shard], message, ticket, awaited, self._timeout_s, nbytes)

    def _take_weights(self, message: Request) -> None:
        """In the client's thread: put the answer where it belongs."""
        assert isinstance(message, (m.Weights, m.WeightsShared))
        chunk = self._layout.chunks[message.chunk]
        if isinstance(message, m.Weights):
            payload = memoryview(message.payload)
            if payload.nbytes != chunk.nbytes:
                raise ProtocolError(f"chunk {chunk.index} has {chunk.nbytes} bytes, the answer {payload.nbytes}")
            self._memory.weights(chunk)[:] = payload
        self._versions[chunk.index] = message.version
        self.traffic.bytes_received += chunk.nbytes
