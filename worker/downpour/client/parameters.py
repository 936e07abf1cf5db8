"""Push and pull of chunks: the lower-level client for loops of any shape (reinforcement learning, custom rules)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from downpour.client.ahead import Ahead
from downpour.client.coding import WorkerCoding
from downpour.client.core import OnAnswer, Submission, Successor, Ticket
from downpour.client.thread import DEADLINE_MARGIN_S, ClientThread
from downpour.client.whole import pull_whole
from downpour.context import WorkerContext
from downpour_common import messages as m
from downpour_common.compression import parse_compression
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
    """Talks to the shards of one job, wherever they move. Chunks go to their shards; base versions are kept per chunk.

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
        """their first addresses, by which the thread knows them"""
        self._addresses = list(shards)
        self._memory = memory
        compression = parse_compression(context.compress)
        self._coding = WorkerCoding(compression) if compression else None
        self._wanted: deque[m.ResidualWanted] = deque()
        self._epochs = [0] * len(shards)
        self._replies: dict[int, m.HelloReply] = {}
        """by shard, the newest"""
        self._attached = [False] * len(shards)
        self._offered: tuple[OfferedMemory, bool] | None = None
        self._left = False
        self._versions = self._base = [0] * len(layout.chunks)
        modes = (context.parsed_mode, *dict(context.parsed_mode.groups).values())
        self._bounded = any(mode.name == "ssp" for mode in modes)
        self._first_seq = 0
        self._next_seq = -1
        """all contributions to trainable chunks below it have been submitted; -1: it is not known where to begin"""
        self._to_add = 0
        """chunks of the push-pull that is being submitted"""
        self._timeout_s = context.timeout_s + DEADLINE_MARGIN_S
        for index, address in enumerate(shards):
            thread.name(address, f"server/{index}")

    @property
    def shard_epochs(self) -> tuple[int, ...]:
        """By shard, as far as is known."""
        return tuple(self._epochs)

    def hello(self) -> list[m.HelloReply]:
        """Introduce this worker to every shard; they refuse a model of another layout. Returns their answers by shard;
        :meth:`begin_at` comes next."""
        replies = self.hello_again()
        self._fetch_residuals()
        return replies

    def hello_again(self) -> list[m.HelloReply]:
        """As :meth:`hello`, by one who has done that: where the shards are by now."""
        self._everywhere(self._hello, "greeting", self._take_reply)
        return [self._replies[shard] for shard in range(len(self._shards))]

    def begin_at(self, seq: int) -> None:
        """Number of this worker's next contribution to trainable chunks, the same to all of them; in ``ssp`` this one
        waits for nothing, see :mod:`downpour_server.policy.stale`."""
        self._first_seq = self._next_seq = seq

    def next_is(self, seq: int) -> None:
        """All contributions below this number have been submitted, to whichever chunks, and some of it have not."""
        self._next_seq = seq

    def take_part(self) -> None:
        """Tell the shards that their rounds are to wait for this worker from its next contribution on; see
        :mod:`downpour_server.policy.exchanges`."""
        self._everywhere(lambda number: self._hello(number, self._next_seq), "greeting", self._take_reply)

    @property
    def numbers(self) -> tuple[int, int]:
        """Of this worker's first contribution to trainable chunks, and of the one that would come next."""
        return self._first_seq, self._next_seq

    def _hello(self, number: int, done: int = -1) -> m.Hello:
        c = self._context
        first = -1 if done < 0 else self._first_seq
        return m.Hello(number, c.job, c.slot, c.worker_epoch, self._layout.digest, done, first)

    def _take_reply(self, message: Request) -> None:
        """In the client's thread."""
        assert isinstance(message, m.HelloReply)
        self._epochs[message.shard] = max(message.shard_epoch, self._epochs[message.shard])
        self._replies[message.shard] = message

    def share(self, offered: OfferedMemory, in_place: bool) -> None:
        """Offer the shards this worker's memory; from then on, push-pulls of its gradients send headers only.

        ``in_place``: the shards may keep their weights in it while there is no other worker; no pull may be open then.
        A shard that cannot map it is served as before.
        """
        self._offered = offered, in_place
        for index, address in enumerate(self._shards):
            try:
                self._thread.ask(address, self._attach(), "shared memory to be mapped", self._timeout_s)
            except PeerRefused:
                continue
            self._attached[index] = True
        if not any(self._attached):
            self.close()

    def _attach(self) -> m.AttachMemory:
        assert self._offered is not None
        c, (offered, in_place) = self._context, self._offered
        number = self._thread.number()
        return m.AttachMemory(number, c.job, c.slot, c.worker_epoch, os.getpid(), offered.fd, offered.nonce, in_place)

    def close(self) -> None:
        """No other shard will map this worker's memory."""
        if self._offered is not None:
            self._offered[0].close_fd()

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

    def pull_of(self, chunks: Iterable[Chunk], place: Callable[[Chunk], memoryview]) -> None:
        """Fetch the newest weights of any chunks, other ranks' of the replica included, to where ``place`` says.

        The worker's own weights stay as they are, and so does what its contributions say that they were computed on.
        """
        c = self._context
        chunks = list(chunks)
        ticket = Ticket(len(chunks), partial(self._take_weights_to, place))
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
        ticket.wait()

    def pull_whole(self) -> dict[str, torch.Tensor]:
        """The newest tensors of the unsplit model, by name, buffers and frozen ones included."""
        return pull_whole(self, self._layout)

    def start_pull(
        self, chunks: Iterable[Chunk], piecewise: bool = False, version: int = -1, after: int = -1
    ) -> Ticket:
        """As :meth:`pull`, without waiting; ``piecewise``: the ticket's answers are the chunks' :class:`Weights`.

        ``version``: the one wanted, if not the newest. ``after``: as :class:`m.Pull` has it.
        """
        c = self._context
        chunks = list(chunks)
        ticket = Ticket(len(chunks), self._take_weights, piecewise)
        self._thread.submit(
            [
                self._submission(
                    chunk,
                    m.Pull(
                        self._thread.number(),
                        c.job,
                        c.slot,
                        c.worker_epoch,
                        chunk.index,
                        version,
                        after,
                        -1 if self._coding is None else self._coding.held(chunk),
                    ),
                    ticket,
                    f"weights of chunk {chunk.index}",
                )
                for chunk in chunks
            ]
        )
        return ticket

    def push(self, chunks: Iterable[Chunk], header: PushHeader) -> None:
        """Send contributions and wait until they are accepted."""
        self.start_push(chunks, header).wait()

    def start_push(self, chunks: Iterable[Chunk], header: PushHeader, last: bool = True) -> Ticket:
        """As :meth:`push`, without waiting. ``last``: all chunks of this contribution have been submitted then."""
        chunks = list(chunks)
        ticket = Ticket(len(chunks))
        self._pay()
        self._thread.submit(
            [
                self._contribution(chunk, m.Push(*self._head(chunk, header), self._payload(chunk, header)), ticket)
                for chunk in chunks
            ]
        )
        if last and chunks and chunks[0].kind == "trainable":
            self._next_seq = header.seq + 1
        return ticket

    def push_portion(self, chunks: Iterable[Chunk], samples: int, evaluation: int, portion: int) -> None:
        """Mode lbfgs: send the gradient of a portion of the data, and wait until all shards have it; see
        :class:`m.PushPortion`."""
        chunks = list(chunks)
        ticket, header = Ticket(len(chunks)), PushHeader(0, samples, (), [b""])
        submissions = []
        for chunk in chunks:
            payload = self._memory.gradient(chunk)
            self.traffic.bytes_sent += payload.nbytes
            message = m.PushPortion(*self._head(chunk, header), evaluation, portion, payload)
            submissions.append(self._contribution(chunk, message, ticket))
        self._thread.submit(submissions)
        ticket.wait()

    def fetched(self) -> list[int]:
        """The versions of the weights that have been fetched last, by chunk."""
        return list(self._versions)

    def compute_on(self, versions: list[int]) -> None:
        """What is pushed from now on was computed on these versions, by chunk; until then, on those fetched last."""
        self._base = versions

    @property
    def version(self) -> int:
        """Updates in the weights that this worker computes on: of its trainable chunks, the least."""
        chunks = self._layout.of_column(self._context.rank).by_kind["trainable"]
        return min((self._base[chunk.index] for chunk in chunks), default=0)

    def sends(self, chunk: Chunk) -> bool:
        """Whether the chunk's contributions travel as payloads that may be sent ahead."""
        return not self._attached[chunk.shard] and (self._coding is None or self._coding.stages(chunk))

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

    def begin_push_pull(self, count: int, piecewise: bool = False, last: bool = True) -> Ticket:
        """A ticket for ``count`` chunks that are pushed and fetched with :meth:`add_push_pull`, some at a time.

        ``piecewise`` as in :meth:`start_pull`, ``last`` as in :meth:`start_push`.
        """
        self._to_add = count if last else -1
        self._pay()
        return Ticket(count, self._take_weights, piecewise)

    def add_push_pull(self, chunks: Iterable[Chunk], header: PushHeader, ticket: Ticket) -> None:
        """Send chunks' contributions; their new weights come with the answers."""
        if self._coding is None:
            submissions = [self._push_pull(chunk, header, ticket) for chunk in chunks]
            self._thread.submit(submissions)
            self._to_add -= len(submissions)
        else:
            for chunk in chunks:  # which takes time: the first is on its way while the next is being encoded
                self._thread.submit([self._push_pull(chunk, header, ticket)])
                self._to_add -= 1
        if not self._to_add:
            self._next_seq = header.seq + 1

    def end_epoch(self, loader: int, epoch: int, leave_point: Callable[[], None]) -> int:
        """No more contributions until every live worker says the same of this pass; returns then. See
        :meth:`ClientThread.wait`.

        In ``sync`` the round that is open then, which is the number of the next contribution, if not less than what
        this worker would have given it.
        """
        c = self._context
        rounds = [self._next_seq]

        def on_answer(message: Request) -> None:
            assert isinstance(message, m.Ack)
            rounds.append(message.version)

        self._pay()
        self._everywhere(
            lambda number: m.EndEpoch(number, c.job, c.slot, c.worker_epoch, loader, epoch),
            "the end of the epoch in all other workers",
            on_answer,
            leave_point,
        )
        self._pay()
        self._next_seq = max(rounds)
        return self._next_seq

    def leave(self) -> None:
        """No more contributions, ever."""
        self._left = True
        self._pay()
        self._everywhere(self._leave, "leave to be noted")

    def _leave(self, number: int) -> m.Leave:
        c = self._context
        return m.Leave(number, c.job, c.slot, c.worker_epoch, self._next_seq)

    # ------------------------------------------------------------ what is owed, see downpour.client.coding

    def residual_wanted(self, notice: m.ResidualWanted) -> None:
        """In any thread: what this worker owes a chunk, before its next contribution, belongs to a snapshot."""
        self._wanted.append(notice)

    def _pay(self) -> None:
        """Tell the shards what they want to know of residuals, as these are now."""
        if self._coding is None or not self._wanted:
            return
        c, submissions = self._context, []
        while self._wanted:  # the client's thread may add some meanwhile
            notice = self._wanted.popleft()
            chunk = self._layout.chunks[notice.chunk]
            owed, number = self._coding.residual(chunk), self._thread.number()
            message = m.Residual(number, c.job, c.slot, c.worker_epoch, notice.snapshot, chunk.index, owed)
            submissions.append(self._submission(chunk, message, Ticket(1), f"residual of chunk {chunk.index}"))
        self._thread.submit(submissions)

    def _fetch_residuals(self) -> None:
        """Go on with what this slot's worker owed at the checkpoint that the job goes on from."""
        coding, c = self._coding, self._context
        if coding is None or not any(reply.residuals for reply in self._replies.values()):
            return

        def on_answer(message: Request) -> None:
            assert isinstance(message, m.ResidualKept)
            coding.owe(self._layout.chunks[message.chunk], message.payload)

        own = self._layout.of_column(c.rank).by_kind["trainable"]
        chunks = [x for x in own if coding.pushes(x) and self._replies[x.shard].residuals]
        ticket = Ticket(len(chunks), on_answer)
        self._thread.submit(
            [
                self._submission(
                    chunk,
                    m.FetchResidual(self._thread.number(), c.job, c.slot, c.worker_epoch, chunk.index),
                    ticket,
                    f"residual of chunk {chunk.index}",
                )
                for chunk in chunks
            ]
        )
        ticket.wait()

    def _payload(self, chunk: Chunk, header: PushHeader) -> memoryview:
        """What is sent as the chunk's contribution; asked for once for each."""
        gradient = self._memory.gradient(chunk)
        if self._coding is None or not self._coding.pushes(chunk):
            return gradient
        return self._coding.encode(chunk, gradient, header.seq, header.samples > 0)

    # ------------------------------------------------------------ shards that move

    def moved(self, notice: m.ShardMoved) -> None:
        """A shard is another process now. In any thread; what is known already changes nothing."""
        if 0 <= notice.shard < len(self._shards):
            self._thread.move(self._shards[notice.shard], partial(self._successor, notice))

    def _successor(self, notice: m.ShardMoved) -> Successor | None:
        """In the client's thread, as all that a successor is asked."""
        shard, known = notice.shard, notice.address == self._addresses[notice.shard]
        if notice.shard_epoch <= self._epochs[shard]:
            return None
        self._epochs[shard], self._addresses[shard] = notice.shard_epoch, notice.address
        greeted = shard in self._replies
        return None if known and not greeted else _MovedShard(self, shard, notice.address)

    def greet(self, shard: int, pending: Iterable[Submission]) -> list[Submission]:
        """What is said to a shard's new process before it is sent what is ``pending``: nothing as long as the first
        greeting is, or is still to come."""
        if shard not in self._replies:
            return []
        unanswered = [
            s.message.seq
            for s in pending
            if isinstance(s.message, m.Contribution) and self._layout.chunks[s.message.chunk].kind == "trainable"
        ]
        said: list[tuple[Request, OnAnswer | None]] = [
            (self._hello(self._thread.number(), min(unanswered, default=self._next_seq)), self._take_reply)
        ]
        if self._attached[shard]:
            said.append((self._attach(), None))
        if self._left:
            said.append((self._leave(self._thread.number()), None))
        return [
            Submission(self._shards[shard], message, Ticket(1, on_answer), "greeting", self._timeout_s)
            for message, on_answer in said
        ]

    def greeted(self, shard: int, said: list[Submission]) -> None:
        """Each of these has its answer, or none. Raises :class:`DownpourError` if this worker is not welcome."""
        for submission in said:
            if submission.ticket.error is None:
                continue
            if not isinstance(submission.message, m.AttachMemory):
                raise submission.ticket.error
            self._attached[shard] = False

    def renewed(self, shard: int, submission: Submission, again: bool) -> Submission | None:
        """See :class:`downpour.client.core.Successor`."""
        message = submission.message
        match message:
            case m.Stage() if again:
                return None
            case m.PushPullStaged() if submission.instead is not None and message.shard_epoch != self._epochs[shard]:
                return replace(submission, message=submission.instead(), instead=None)
            case m.PushPullShared() if not self._attached[shard]:
                chunk = self._layout.chunks[message.chunk]
                sent = m.PushPull(
                    self._thread.number(),
                    message.job,
                    self._epochs[shard],
                    message.slot,
                    message.worker_epoch,
                    message.seq,
                    message.base_version,
                    message.chunk,
                    message.samples,
                    message.position,
                    message.hyper,
                    self._memory.gradient(chunk),
                )
                return self._submission(chunk, sent, submission.ticket, submission.awaited, self._needs_credit(sent))
            case m.Contribution() if again or message.shard_epoch != self._epochs[shard]:
                number, epoch = self._thread.number(), self._epochs[shard]
                return replace(submission, message=replace(message, request=number, shard_epoch=epoch))
            case _ if again:
                return replace(submission, message=replace(message, request=self._thread.number()))
        return submission

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
        payload = self._payload(chunk, header)
        if self._coding is not None and self._coding.differs(chunk):
            return self._contribution(chunk, m.PushPullHeld(*head, self._coding.held(chunk), payload), ticket)
        return self._contribution(chunk, m.PushPull(*head, payload), ticket)

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
            case m.Push(payload=payload) | m.PushPull(payload=payload) | m.PushPullHeld(payload=payload):
                self.traffic.bytes_sent += memoryview(payload).nbytes
            case m.PushPullShared():
                self.traffic.bytes_sent += chunk.nbytes
        awaited = f"answer to push {message.seq} of chunk {chunk.index}"
        return self._submission(chunk, message, ticket, awaited, self._needs_credit(message))

    def _needs_credit(self, message: m.Contribution) -> bool:
        # The first one must not wait for credit in ssp, see downpour_server.policy.stale.
        free = self._bounded and message.seq == self._first_seq
        return not free and not isinstance(message, m.PushPullShared)

    def _submission(
        self, chunk: Chunk, message: Request, ticket: Ticket, awaited: str, counted: bool = True
    ) -> Submission:
        """``counted``: the chunk itself is sent or comes back, and counts against the credit."""
        nbytes = chunk.nbytes if counted else 0
        return Submission(self._shards[chunk.shard], message, ticket, awaited, self._timeout_s, nbytes)

    def _take_weights(self, message: Request) -> None:
        """In the client's thread: put the answer where it belongs."""
        assert isinstance(message, (m.Weights, m.WeightsShared, m.WeightsCoded))
        chunk, nbytes = self._layout.chunks[message.chunk], 0
        match message:
            case m.Weights():
                self._memory.weights(chunk)[:] = _payload_of(message, chunk)
                nbytes = chunk.nbytes
                if self._coding is not None:
                    self._coding.not_coded(chunk)
            case m.WeightsCoded():
                if self._coding is None:
                    raise ProtocolError(f"chunk {chunk.index} comes encoded, and this job has no codecs")
                nbytes = memoryview(message.payload).nbytes
                if not self._coding.take(message, chunk, self._memory.weights(chunk)):
                    return
            case m.WeightsShared():
                nbytes = chunk.nbytes
        self._versions[chunk.index] = message.version
        self.traffic.bytes_received += nbytes

    def _take_weights_to(self, place: Callable[[Chunk], memoryview], message: Request) -> None:
        """In the client's thread."""
        assert isinstance(message, (m.Weights, m.WeightsShared))
        chunk = self._layout.chunks[message.chunk]
        if isinstance(message, m.WeightsShared):  # the shard keeps them in this worker's memory
            place(chunk)[:] = self._memory.weights(chunk)
        else:
            place(chunk)[:] = _payload_of(message, chunk)
        self.traffic.bytes_received += chunk.nbytes


def _payload_of(message: m.Weights, chunk: Chunk) -> memoryview:
    payload = memoryview(message.payload)
    if payload.nbytes != chunk.nbytes:
        raise ProtocolError(f"chunk {chunk.index} has {chunk.nbytes} bytes, the answer {payload.nbytes}")
    return payload


@dataclass(frozen=True, slots=True)
class _MovedShard:
    """See :class:`downpour.client.core.Successor`."""

    client: ParameterClient
    shard: int
    address: str

    def greet(self, pending: list[Submission]) -> list[Submission]:
        return self.client.greet(self.shard, pending)

    def greeted(self, said: list[Submission]) -> None:
        self.client.greeted(self.shard, said)

    def renewed(self, submission: Submission, again: bool) -> Submission | None:
        return self.client.renewed(self.shard, submission, again)
