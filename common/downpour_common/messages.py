"""The closed set of messages that Downpour's processes exchange. PROTOCOL.md tells the conversations.

A message is a frozen dataclass; :mod:`downpour_common.wire` turns it into frames and back. Fields are checked
against their annotations when decoded: ``int`` fields fit 63 bits and are at least -1; receivers check the rest.
A request carries ``request``, a number unique on its connection; its answer repeats it.

Identity of a contribution: (job, shard_epoch, slot, worker_epoch, seq, chunk), and what it was computed on,
``base_version``. It stands in the payload; ZeroMQ's routing identity never counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

Buffer = bytes | bytearray | memoryview
"""Raw tensor bytes, little-endian, row-major. As a field it travels as a frame of its own, never copied."""

Document = dict[str, Any]
"""Plain values (None, bool, int, float, str, list, dict with string keys) for the control plane."""


class Refusal(StrEnum):
    """Why a request was refused."""

    WRONG_JOB = "wrong-job"
    STALE_EPOCH = "stale-epoch"
    STALE_SEQ = "stale-seq"
    MODEL_DIFFERS = "model-differs"
    MALFORMED = "malformed"
    NOT_READY = "not-ready"
    NON_FINITE = "non-finite"
    DATA_DIFFERS = "data-differs"
    TIMED_OUT = "timed-out"
    CHECKPOINT = "checkpoint"
    NOT_SHARED = "not-shared"


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. ``TAG`` is the first field of the header and never reused."""

    TAG: ClassVar[int]


@dataclass(frozen=True, slots=True)
class Request(Message):
    """Base of all messages that are answered."""

    request: int


# ---------------------------------------------------------------- data plane: worker → shard


@dataclass(frozen=True, slots=True)
class Hello(Request):
    """A worker introduces itself. Answered by :class:`HelloReply`, :class:`Refused`."""

    TAG = 1
    job: str
    slot: int
    worker_epoch: int
    digest: str
    """hex digest of the worker's ModelSpec"""


@dataclass(frozen=True, slots=True)
class Init(Request):
    """The chief's initial weights of one chunk. Answered by :class:`Ack`."""

    TAG = 2
    job: str
    slot: int
    worker_epoch: int
    chunk: int
    payload: Buffer
    """chunk.nbytes bytes of chunk.dtype"""


@dataclass(frozen=True, slots=True)
class Contribution(Request):
    """What one worker adds to one chunk: base of :class:`Push`, :class:`PushPull` and :class:`PushPullShared`."""

    job: str
    shard_epoch: int
    slot: int
    worker_epoch: int
    seq: int
    """number of this contribution of this worker to this chunk's kind, from the job's start clock upwards"""
    base_version: int
    """version of the chunk that the contribution was computed on"""
    chunk: int
    samples: int
    """training samples behind the contribution: its weight in an average"""
    position: tuple[int, ...]
    """(epoch, offset in samples) of the training data after this contribution; what a resumed job goes on from"""
    hyper: bytes
    """msgpack map of the parameter group's options in force (lr, …); empty: as before"""


@dataclass(frozen=True, slots=True)
class Push(Contribution):
    """Add a contribution. Answered by :class:`Ack` once it is accepted."""

    TAG = 3
    payload: Buffer
    """chunk.nbytes bytes of chunk.dtype"""


@dataclass(frozen=True, slots=True)
class PushPull(Contribution):
    """Add a contribution and fetch the chunk when the policy allows. Answered by :class:`Weights`."""

    TAG = 4
    payload: Buffer
    """chunk.nbytes bytes of chunk.dtype"""


@dataclass(frozen=True, slots=True)
class Pull(Request):
    """Fetch the newest weights of a chunk, once it is initialised. Answered by :class:`Weights`."""

    TAG = 5
    job: str
    slot: int
    worker_epoch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class EndEpoch(Request):
    """No more contributions of this worker until every other live one says the same; :class:`Ack` comes then."""

    TAG = 6
    job: str
    slot: int
    worker_epoch: int


@dataclass(frozen=True, slots=True)
class Leave(Request):
    """No more contributions of this worker, ever. Answered by :class:`Ack`."""

    TAG = 7
    job: str
    slot: int
    worker_epoch: int


@dataclass(frozen=True, slots=True)
class AttachMemory(Request):
    """Offer the shard memory to share: file descriptor ``fd`` of process ``pid``, laid out as ``layout.SharedLayout``.

    Answered by :class:`Ack` once the shard has mapped it and found ``nonce`` at its end, else by :class:`Refused`;
    the worker then goes on without.
    """

    TAG = 8
    job: str
    slot: int
    worker_epoch: int
    pid: int
    fd: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class PushPullShared(Contribution):
    """As :class:`PushPull`, with the contribution in shared memory. Answered by :class:`WeightsShared`.

    The contribution must stay unchanged, and the weights unread, until the answer.
    """

    TAG = 9


# ---------------------------------------------------------------- data plane: shard → worker


@dataclass(frozen=True, slots=True)
class HelloReply(Request):
    """The shard's side of :class:`Hello`."""

    TAG = 16
    shard: int
    shard_epoch: int
    clock: int
    """the next seq that the shard expects of a worker"""


@dataclass(frozen=True, slots=True)
class Ack(Request):
    """The request is done; for a :class:`Push`, ``version`` is the chunk's when it was accepted (0 elsewhere)."""

    TAG = 17
    version: int


@dataclass(frozen=True, slots=True)
class Weights(Request):
    """A chunk's weights at ``version``."""

    TAG = 18
    chunk: int
    version: int
    payload: Buffer
    """chunk.nbytes bytes of chunk.dtype"""


@dataclass(frozen=True, slots=True)
class WeightsShared(Request):
    """A chunk's weights at ``version`` are in the worker's shared memory."""

    TAG = 20
    chunk: int
    version: int


@dataclass(frozen=True, slots=True)
class Refused(Request):
    """The request cannot be met; ``code`` is a :class:`Refusal`, ``reason`` is for people."""

    TAG = 19
    code: str
    reason: str


# ---------------------------------------------------------------- control plane: shard ↔ coordinator


@dataclass(frozen=True, slots=True)
class RegisterShard(Message):
    """A shard process is up; its data socket is at ``address``."""

    TAG = 32
    job: str
    shard: int
    shard_epoch: int
    pid: int
    address: str


@dataclass(frozen=True, slots=True)
class SetUpShard(Message):
    """What the shard is to hold: the model's specification, and the checkpoint folder to start from ("" for none)."""

    TAG = 33
    model: Document
    resume: str


@dataclass(frozen=True, slots=True)
class ShardReady(Message):
    """The shard holds its chunks. ``error`` is empty unless it could not load the checkpoint."""

    TAG = 34
    shard: int
    error: str


@dataclass(frozen=True, slots=True)
class TakeSnapshot(Message):
    """Write a snapshot into ``folder`` at clock ``at_clock`` (sync) or now (-1)."""

    TAG = 35
    snapshot: int
    folder: str
    at_clock: int
    """may be -1: now"""


@dataclass(frozen=True, slots=True)
class SnapshotTaken(Message):
    """The shard's file is on disk, or ``error`` says why it is not."""

    TAG = 36
    shard: int
    snapshot: int
    error: str
    document: Document
    """the shard's entry in the manifest"""


@dataclass(frozen=True, slots=True)
class ShardReport(Message):
    """Counters of a shard since its start."""

    TAG = 37
    shard: int
    document: Document


@dataclass(frozen=True, slots=True)
class StopShard(Message):
    """The job is over; end."""

    TAG = 38


# ---------------------------------------------------------------- control plane: worker ↔ coordinator


@dataclass(frozen=True, slots=True)
class RegisterWorker(Request):
    """A worker called ``prepare``. Answered by :class:`Welcome` when the whole job is ready, or :class:`Refused`."""

    TAG = 48
    job: str
    slot: int
    worker_epoch: int
    pid: int
    model: Document


@dataclass(frozen=True, slots=True)
class Welcome(Request):
    """The job is ready to train."""

    TAG = 49
    shards: tuple[str, ...]
    """data addresses by shard index"""
    restored: bool
    """whether the shards hold a checkpoint's weights, so that nobody initialises them"""
    clock: int
    """the job's clock to start from"""
    position: tuple[int, ...]
    """(epoch, offset in samples) of the training data to start from"""


@dataclass(frozen=True, slots=True)
class TakeLease(Request):
    """A worker wants samples of one pass. Answered by :class:`Lease`, :class:`Refused`."""

    TAG = 50
    slot: int
    loader: int
    epoch: int
    total: int
    """samples in the whole pass"""
    unit: int
    """samples per batch; leases are multiples of it"""
    order: str
    """hex digest of the order of samples; must be the same in every worker"""
    done: tuple[int, ...]
    """flat (start, stop) pairs of positions that this worker has finished since its last request"""


@dataclass(frozen=True, slots=True)
class Lease(Request):
    """Positions ``start:stop`` of the pass belong to the asker; start == stop: none are left."""

    TAG = 51
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class EnterBarrier(Request):
    """Answered by :class:`Ack` when all live workers have entered the barrier of this ``name``."""

    TAG = 52
    slot: int
    name: str


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """What a worker has done so far. One-way, a few times per second at most."""

    TAG = 53
    slot: int
    clock: int
    epoch: int
    samples: int
    pushes: int
    pulls: int
    bytes_sent: int
    bytes_received: int
    wait_s: float
    """time spent waiting for the servers since the start"""


@dataclass(frozen=True, slots=True)
class LogMetrics(Message):
    """Scalars that the script logged at ``clock``."""

    TAG = 54
    slot: int
    clock: int
    values: Document


@dataclass(frozen=True, slots=True)
class ReportFailure(Message):
    """The script raised; sent before the process ends."""

    TAG = 55
    slot: int
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Goodbye(Request):
    """The worker's script is done; its last :class:`Progress` went before. Answered by :class:`Ack`."""

    TAG = 56
    slot: int
    worker_epoch: int


@dataclass(frozen=True, slots=True)
class ShouldStop(Message):
    """To a worker: end the training loop soon (``downpour.should_stop()``)."""

    TAG = 57
    reason: str
