"""Mode ``lbfgs``: vector commands between coordinator and shards, portions of the data, and their gradients.

Every command is numbered and may come any number of times: it is carried out once.
"""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages.base import Buffer, Document, Message, Request
from downpour_common.messages.control import FromShard, WorkerRequest
from downpour_common.messages.data import Contribution


@dataclass(frozen=True, slots=True)
class PushPortion(Contribution):
    """A worker's gradient of one portion of the data, summed over its samples. Answered by :class:`Ack`.

    Of each (``evaluation``, ``portion``) the first counts; what comes later, or for an evaluation that is not under
    way, changes nothing. ``seq`` says nothing here.
    """

    TAG = 14
    evaluation: int
    portion: int
    payload: Buffer
    """chunk.numel elements of chunk.dtype"""


@dataclass(frozen=True, slots=True)
class VectorOps(Message):
    """To a shard: carry this out, unless it has been already. Answered by :class:`VectorsDone`; repeated until then."""

    TAG = 46
    attempt: int
    """grows whenever everything begins anew"""
    number: int
    """of the command in this attempt, from 1 upwards"""
    ops: tuple[int, ...]
    """see ``downpour_common.vectors``"""
    scalars: bytes
    """float64, least significant byte first"""


@dataclass(frozen=True, slots=True)
class VectorsDone(FromShard):
    """The command ``number`` has been carried out, or ``gone``: what came before it is not known here."""

    TAG = 47
    attempt: int
    number: int
    gone: bool
    results: bytes
    """float64, least significant byte first: this shard's part of each"""


@dataclass(frozen=True, slots=True)
class TakePortion(WorkerRequest):
    """A worker has nothing to do. Answered by :class:`Portion` or :class:`Minimised`, once there is either.

    ``evaluation``, ``portion``, ``loss`` and ``samples`` tell of the portion that it has finished; all shards have its
    gradient then, unless ``loss`` is not finite.
    """

    TAG = 73
    run: int
    """number of this call of ``downpour.minimize`` in its script, from 1 upwards"""
    options: Document
    """of the call; empty with a portion that is finished"""
    evaluation: int
    """-1: none is finished"""
    portion: int
    loss: float
    """summed over the samples"""
    samples: int


@dataclass(frozen=True, slots=True)
class Portion(Request):
    """Samples ``start:stop`` of the data, to be computed with the newest weights."""

    TAG = 74
    evaluation: int
    portion: int
    start: int
    stop: int
    clock: int
    """of the job: iterations completed, those before a resume included"""


@dataclass(frozen=True, slots=True)
class Minimised(Request):
    """The run is over: its result. The newest weights are those."""

    TAG = 75
    result: Document


@dataclass(frozen=True, slots=True)
class PortionOver(Message):
    """To a worker that computes this portion: nobody waits for it any more."""

    TAG = 76
    evaluation: int
    portion: int
