"""Data plane: workers and shards.

Identity of a contribution: (job, shard_epoch, slot, worker_epoch, seq, chunk), and what it was computed on,
``base_version``. It stands in the payload; ZeroMQ's routing identity never counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages.base import Buffer, Message, Request

# ---------------------------------------------------------------- worker → shard


@dataclass(frozen=True, slots=True)
class Hello(Request):
    """A worker introduces itself. Answered by :class:`HelloReply`, :class:`Refused`."""

    TAG = 1
    job: str
    slot: int
    worker_epoch: int
    digest: str
    """hex digest of the worker's ModelSpec"""
    done: int = -1
    """to a shard that has taken another's place: number of the first contribution that the former one may not have
    answered; -1: this worker begins"""
    first: int = -1
    """with ``done``: number of this worker's first contribution"""


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
    """What one worker adds to one chunk: base of :class:`Push`, :class:`PushPull` and its variants without payload."""

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
    """chunk.numel elements of ``dtypes.pushed_as(chunk.dtype, …)``, as the job has it; or encoded by the job's codec"""


@dataclass(frozen=True, slots=True)
class PushPull(Contribution):
    """Add a contribution and fetch the chunk when the policy allows. Answered by :class:`Weights`."""

    TAG = 4
    payload: Buffer
    """chunk.numel elements of ``dtypes.pushed_as(chunk.dtype, …)``, as the job has it; or encoded by the job's codec"""


@dataclass(frozen=True, slots=True)
class Pull(Request):
    """Fetch the newest weights of a chunk, once it is initialised. Answered by :class:`Weights`, or
    :class:`WeightsShared` (see :class:`AttachMemory`).

    With a ``version`` it is answered with the weights of that version, once they are there, and refused as
    ``stale-seq`` if they are gone.
    """

    TAG = 5
    job: str
    slot: int
    worker_epoch: int
    chunk: int
    version: int = -1
    """-1: the newest"""
    after: int = -1
    """answered no earlier than a :class:`PushPull` of this number by the same worker would be; -1: as soon as may be"""
    held: int = -1
    """in a job whose weights are encoded: number of the view that the worker has, 0 for none; answered by
    :class:`WeightsCoded` then. -1: the weights themselves are wanted, and the worker's view stays what it is"""


@dataclass(frozen=True, slots=True)
class EndEpoch(Request):
    """No more contributions of this worker until every other live one says the same; :class:`Ack` comes then, with the
    shard's round. One for a pass that is over already is answered at once."""

    TAG = 6
    job: str
    slot: int
    worker_epoch: int
    loader: int = -1
    epoch: int = 0
    """which pass it is that ends; a loader of -1: none that is known, and numbers go on as they are"""


@dataclass(frozen=True, slots=True)
class Leave(Request):
    """No more contributions of this worker, ever. Answered by :class:`Ack`."""

    TAG = 7
    job: str
    slot: int
    worker_epoch: int
    done: int = -1
    """number that its next contribution would have had; all before were answered. -1: not known"""


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
    in_place: bool
    """the shard may keep its weights there while this worker is the only one. The worker has no Pull open then, and
    its later Pulls of trainable chunks are answered by :class:`WeightsShared`"""


@dataclass(frozen=True, slots=True)
class PushPullShared(Contribution):
    """As :class:`PushPull`, with the contribution in shared memory. Answered by :class:`WeightsShared`.

    The contribution must stay unchanged, and the weights unread, until the answer.
    """

    TAG = 9


@dataclass(frozen=True, slots=True)
class Stage(Request):
    """The payload of a push-pull that may follow, ahead of it. It changes nothing yet. Answered by :class:`Staged`.

    The payload's memory may change before the answer: what the shard holds is then any mixture of old and new. A newer
    one for the chunk, or any contribution of this worker to it, takes its place.
    """

    TAG = 10
    job: str
    slot: int
    worker_epoch: int
    chunk: int
    payload: Buffer
    """chunk.numel elements of ``dtypes.pushed_as(chunk.dtype, …)``, as the job has it"""


@dataclass(frozen=True, slots=True)
class PushPullStaged(Contribution):
    """As :class:`PushPull`, with the payload of an earlier :class:`Stage`.

    Refused with ``not-staged``, and nothing recorded, if the shard does not hold exactly that.
    """

    TAG = 11
    stage: int
    """request number of the :class:`Stage`"""
    digest: bytes
    """of the payload meant, as in :class:`Staged`; empty where its memory cannot have changed under way"""


@dataclass(frozen=True, slots=True)
class PushPullHeld(Contribution):
    """As :class:`PushPull`, by a worker that has a view of the chunk. Answered by :class:`WeightsCoded`."""

    TAG = 29
    held: int
    """number of its view, see :class:`WeightsCoded`"""
    payload: Buffer
    """the chunk's contribution as a :class:`PushPull` has it"""


@dataclass(frozen=True, slots=True)
class Residual(Request):
    """What this worker still owes a chunk, as :class:`ResidualWanted` asks for it. Answered by :class:`Ack`."""

    TAG = 15
    job: str
    slot: int
    worker_epoch: int
    snapshot: int
    chunk: int
    payload: Buffer
    """chunk.nbytes bytes of float32"""


@dataclass(frozen=True, slots=True)
class FetchResidual(Request):
    """What this slot's worker owed a chunk when the checkpoint was taken that the job goes on from. Answered by
    :class:`ResidualKept`."""

    TAG = 27
    job: str
    slot: int
    worker_epoch: int
    chunk: int


# ---------------------------------------------------------------- a shard's follower → its leader


@dataclass(frozen=True, slots=True)
class Replicated(Message):
    """A follower holds all items of ``stream`` up to ``number``. Said at once when there is news, and every 0.5 s.

    ``stream`` 0: it holds nothing yet. The leader begins a new stream unless it has one for this follower.
    """

    TAG = 12
    job: str
    shard: int
    term: int
    """of the leader that it follows"""
    process: int
    """the follower's process among the job's servers, and its epoch: who it is to the coordinator"""
    epoch: int
    stream: int
    number: int
    again: bool
    """what came last leaves a gap: everything above ``number`` is to be sent again"""


@dataclass(frozen=True, slots=True)
class Fenced(Message):
    """To a leader whose term is over: ``term`` is the one in force."""

    TAG = 13
    job: str
    shard: int
    term: int


# ---------------------------------------------------------------- shard → worker


@dataclass(frozen=True, slots=True)
class HelloReply(Request):
    """The shard's side of :class:`Hello`."""

    TAG = 16
    shard: int
    shard_epoch: int
    clock: int
    """the next seq that the shard expects of a worker; sync: the lowest over its chunks"""
    position: tuple[int, ...] = ()
    """sync, to a worker that takes over: of the training data before its contribution ``clock``, as that worker's
    predecessor has told it; empty: it has contributed nothing yet"""
    buffers: int = 0
    """the next seq that the shard expects in this worker's contributions to buffers, the lowest over its chunks"""
    ended: tuple[int, ...] = ()
    """(loader, epoch) of the pass whose :class:`EndEpoch` this slot has sent last; empty: none"""
    residuals: bool = False
    """the shard keeps what this slot's worker owed at a checkpoint, for :class:`FetchResidual`"""


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
class Staged(Request):
    """The shard holds the payload of a :class:`Stage`."""

    TAG = 21
    digest: bytes
    """64-bit XXH3 of the payload as it came, most significant byte first"""


@dataclass(frozen=True, slots=True)
class WeightsCoded(Request):
    """A chunk's weights at ``version``, in a job whose weights are encoded.

    With a codec that loses little, the payload is the weights, encoded; ``view`` and ``base`` are 0. With others a
    worker has a *view*, which follows the weights: a payload with ``base`` 0 is the view itself, else an encoded
    difference to the view of number ``base``, whose seed is ``view``.
    """

    TAG = 22
    chunk: int
    version: int
    view: int
    """number of the view that the worker has then"""
    base: int
    payload: Buffer


@dataclass(frozen=True, slots=True)
class ResidualWanted(Message):
    """What this worker owes the chunk before its next contribution to it belongs to a snapshot. It sends
    :class:`Residual` before that, or before it leaves."""

    TAG = 23
    job: str
    snapshot: int
    chunk: int


@dataclass(frozen=True, slots=True)
class ResidualKept(Request):
    """The answer to :class:`FetchResidual`."""

    TAG = 28
    chunk: int
    payload: Buffer
    """chunk.nbytes bytes of float32; empty: nothing is owed"""


# ---------------------------------------------------------------- a shard's leader → its follower


@dataclass(frozen=True, slots=True)
class Item(Message):
    """Base of what a leader says, numbered from 1 in each stream. A newer stream begins everything anew."""

    term: int
    stream: int
    number: int


@dataclass(frozen=True, slots=True)
class Replicate(Item):
    """An input of the leader's, to be taken exactly as the leader takes it. Acknowledged by :class:`Replicated`."""

    TAG = 24
    message: bytes
    """the input's header frame"""
    bare: bool
    """the input has no payload; ``payload`` is empty then"""
    payload: Buffer


@dataclass(frozen=True, slots=True)
class ReplicaState(Item):
    """A part of the leader's whole state as it was when the stream began; inputs since then may come in between."""

    TAG = 25
    last: bool
    payload: Buffer
    """the next bytes of the state, at most 1 MiB; see ``downpour_server.state``"""


@dataclass(frozen=True, slots=True)
class ReplicaComplete(Item):
    """From here on no answer leaves the leader before the follower holds every input that it may follow from."""

    TAG = 26
