"""Control plane of one job: its shards and workers, and the coordinator.

Every message to the coordinator names job, index and epoch of its sender; one of an older epoch is refused. A
sender repeats a request that is not answered, so the coordinator may be restarted; what a repeat asks for is done
once.
"""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages.base import Buffer, Document, Message, Request

# ---------------------------------------------------------------- shard ↔ coordinator


@dataclass(frozen=True, slots=True)
class FromShard(Message):
    """Base of what a shard tells the coordinator."""

    job: str
    shard: int
    shard_epoch: int


@dataclass(frozen=True, slots=True)
class RegisterShard(FromShard):
    """A shard process is up; its data socket is at ``address``. Repeated until :class:`SetUpShard` comes."""

    TAG = 32
    pid: int
    address: str


@dataclass(frozen=True, slots=True)
class SetUpShard(Message):
    """What the shard is to hold: the model's specification, and the checkpoint folder to start from ("" for none).

    A relative folder is below the job's folder on the shard's host.
    """

    TAG = 33
    model: Document
    resume: str
    recovers: bool = False
    """it takes the place of a shard that has died, while the job goes on: it starts from its own file of that
    checkpoint, windows against repeats included"""
    clock: int = -1
    """number of the first contribution of the job's first workers; -1: the checkpoint's clock"""


@dataclass(frozen=True, slots=True)
class TakeSnapshot(Message):
    """Write a snapshot into ``folder`` (as in :class:`SetUpShard`) at clock ``at_clock`` (sync) or now (-1)."""

    TAG = 35
    snapshot: int
    folder: str
    at_clock: int
    """may be -1: now"""


@dataclass(frozen=True, slots=True)
class StopShard(Message):
    """The job is over; end."""

    TAG = 38


@dataclass(frozen=True, slots=True)
class ShardReady(FromShard):
    """The shard holds its chunks. ``error`` is empty unless it could not load the checkpoint."""

    TAG = 39
    error: str


@dataclass(frozen=True, slots=True)
class SnapshotTaken(FromShard):
    """The shard's file is on disk (and has been uploaded, where it must be), or ``error`` says why it is not."""

    TAG = 40
    snapshot: int
    error: str
    document: Document
    """the shard's entry in the manifest"""


@dataclass(frozen=True, slots=True)
class ShardReport(FromShard):
    """Counters of a shard since its start. Every 0.5 s."""

    TAG = 41
    document: Document


@dataclass(frozen=True, slots=True)
class SetMembers(Message):
    """The workers that count from now on. Answered by :class:`MembersSet`; an older ``version`` is ignored."""

    TAG = 42
    version: int
    slots: tuple[int, ...]
    """flat (slot, worker_epoch) pairs"""
    takes_over: tuple[int, ...] = ()
    """sync: slots whose workers go on where one before them was, which may have died after it had left the shards"""
    left: tuple[int, ...] = ()
    """flat (slot, worker_epoch, first, done), as in :class:`Goodbye`, of workers that have left: what they have told a
    shard's former process"""


@dataclass(frozen=True, slots=True)
class MembersSet(FromShard):
    """:class:`SetMembers` of this ``version`` (or a newer one) is in force."""

    TAG = 43
    version: int


@dataclass(frozen=True, slots=True)
class SnapshotPart(Request):
    """Bytes of a snapshot's file for the coordinator's host. Answered by :class:`Ack` with the bytes held so far.

    Parts come in order; one that leaves a gap is answered with what is held, and the shard goes on from there.
    """

    TAG = 44
    job: str
    shard: int
    shard_epoch: int
    snapshot: int
    name: str
    """file name within the snapshot's folder"""
    offset: int
    payload: Buffer


@dataclass(frozen=True, slots=True)
class SetBackup(Message):
    """To a leader: this process is its follower from now on. It names itself to the leader (:class:`Replicated`).

    Until that one is complete, and for good with ``process`` -1, the leader answers alone. Repeated until the leader's
    reports say so.
    """

    TAG = 34
    term: int
    """of the leader; another one ignores it"""
    process: int
    """may be -1: none"""
    epoch: int


@dataclass(frozen=True, slots=True)
class Follow(Message):
    """To a shard process that is set up as a follower: its leader, by term and data address. Repeated until its
    reports say so; one of an older term is ignored."""

    TAG = 36
    term: int
    address: str


@dataclass(frozen=True, slots=True)
class Promote(Message):
    """To a follower that is complete: it leads from now on, in this term. Answered by :class:`Promoted`."""

    TAG = 37
    term: int


@dataclass(frozen=True, slots=True)
class Promoted(FromShard):
    """The answer to every :class:`Promote`: the process leads in ``term``, or ``error`` says why it does not."""

    TAG = 45
    term: int
    error: str


# ---------------------------------------------------------------- worker ↔ coordinator


@dataclass(frozen=True, slots=True)
class WorkerRequest(Request):
    """Base of what a worker asks the coordinator."""

    job: str
    slot: int
    worker_epoch: int


@dataclass(frozen=True, slots=True)
class WorkerNotice(Message):
    """Base of what a worker tells the coordinator without an answer."""

    job: str
    slot: int
    worker_epoch: int


@dataclass(frozen=True, slots=True)
class RegisterWorker(WorkerRequest):
    """A worker called ``prepare``. Answered by :class:`Welcome` when the whole job is ready, or :class:`Refused`."""

    TAG = 48
    pid: int
    model: Document


@dataclass(frozen=True, slots=True)
class Welcome(Request):
    """The job is ready to train."""

    TAG = 67
    shards: tuple[str, ...]
    """data addresses by shard index"""
    restored: bool
    """whether the shards hold weights already (a checkpoint's, or of a job under way), so nobody initialises them"""
    clock: int
    """the job's clock to start from"""
    position: tuple[int, ...]
    """(epoch, offset in samples) of the training data to start from"""
    slots: tuple[int, ...]
    """the members' slots, ascending; the first is the chief's"""
    takes_over: bool = False
    """sync: this worker goes on where another one in its slot has died; :class:`HelloReply` tells where that was"""


@dataclass(frozen=True, slots=True)
class ShardMoved(Message):
    """To a worker: this shard is another process now. What the former one has not answered is sent to the new one."""

    TAG = 68
    shard: int
    shard_epoch: int
    address: str


@dataclass(frozen=True, slots=True)
class MembersChanged(Message):
    """To a worker: these slots, ascending, are the job's workers now; the first is the chief's."""

    TAG = 66
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BeginPass(WorkerRequest):
    """sync: a worker begins a pass over a loader. Answered by :class:`PassBegins`."""

    TAG = 58
    loader: int
    epoch: int
    clock: int
    """steps that the worker has completed"""


@dataclass(frozen=True, slots=True)
class PassBegins(Request):
    """How the pass is split: by this many ``workers``, of which the asker is number ``index``."""

    TAG = 59
    workers: int
    index: int


@dataclass(frozen=True, slots=True)
class TakeLease(WorkerRequest):
    """A worker wants samples of one pass. Answered by :class:`Lease`, :class:`Refused`."""

    TAG = 60
    loader: int
    epoch: int
    total: int
    """samples in the whole pass"""
    unit: int
    """samples per batch; leases are multiples of it. 0: only report what is done"""
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
class EnterBarrier(WorkerRequest):
    """Answered by :class:`Ack` when all live workers have entered the barrier of this ``name``."""

    TAG = 61
    name: str


@dataclass(frozen=True, slots=True)
class Progress(WorkerNotice):
    """What a worker has done so far. A few times per second at most."""

    TAG = 62
    clock: int
    epoch: int
    samples: int
    pushes: int
    pulls: int
    bytes_sent: int
    bytes_received: int
    wait_s: float
    """time spent waiting for the servers since the start"""
    shard_epochs: tuple[int, ...] = ()
    """by shard, as far as the worker knows; what is older is answered by :class:`ShardMoved`"""


@dataclass(frozen=True, slots=True)
class LogMetrics(WorkerRequest):
    """Scalars that the script logged at ``clock``. Answered by :class:`Ack`; the script does not wait for it."""

    TAG = 63
    clock: int
    values: Document


@dataclass(frozen=True, slots=True)
class ReportFailure(WorkerNotice):
    """The script raised; sent before the process ends."""

    TAG = 64
    error: str
    traceback: str
    consequence: str = ""
    """it has raised because another rank of its replica has ended (``gone``) or does not do its part (``late``)"""


@dataclass(frozen=True, slots=True)
class Goodbye(WorkerRequest):
    """The worker has left the shards; its last :class:`Progress` went before. Answered by :class:`Ack`."""

    TAG = 65
    drained: bool
    """it leaves before its script was done, because it was asked to (SIGTERM)"""
    torn: int
    """sync: samples of its part of the open pass that nobody will train"""
    first: int = -1
    done: int = -1
    """numbers of its first contribution and of the one that would come next; all in between were answered. -1: none"""


@dataclass(frozen=True, slots=True)
class Agree(WorkerRequest):
    """What is to be the same for several workers: the first value that is proposed for ``key`` in a job is everybody's.

    Answered by :class:`Agreed` once there is one. A key that ends in ``/REPLICA/EPOCH`` is forgotten with the processes
    of that replica."""

    TAG = 69
    key: str
    value: bytes
    proposes: bool
    """whether ``value`` is a proposal; otherwise it is empty, and the sender waits for that of another worker"""


@dataclass(frozen=True, slots=True)
class Agreed(Request):
    """The value of the key that was asked for."""

    TAG = 70
    value: bytes


@dataclass(frozen=True, slots=True)
class Spans(WorkerRequest):
    """What a traced worker has done since it said so last: a line of ``spans.jsonl``, without its end.

    Answered by :class:`Ack`, whose ``version`` is the coordinator's ``time.time_ns()``, or by :class:`Refused`; then no
    more are sent."""

    TAG = 71
    payload: Buffer


@dataclass(frozen=True, slots=True)
class ShouldStop(Message):
    """To a worker: end the training loop soon (``downpour.should_stop()``)."""

    TAG = 57
    reason: str
    by_script: bool = False
    """a worker's script has said so (:class:`EndTraining`): nothing interrupts the job, its workers end as always"""


@dataclass(frozen=True, slots=True)
class EndTraining(WorkerRequest):
    """A worker's script finds that the job's training is done (``downpour.stop()``). Answered by :class:`Ack`; every
    worker is told :class:`ShouldStop`, and again with each :class:`Progress` of its."""

    TAG = 72
    clock: int
    reason: str
