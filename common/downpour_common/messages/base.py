"""What all messages have in common."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

Buffer = bytes | bytearray | memoryview
"""Raw bytes: tensors (little-endian, row-major) or a file's. As a field it travels as a frame of its own, uncopied."""

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
    NOT_STAGED = "not-staged"
    FORBIDDEN = "forbidden"
    UNKNOWN = "unknown"
    UNUSABLE = "unusable"
    TOO_LARGE = "too-large"


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. ``TAG`` is the first field of the header and never reused."""

    TAG: ClassVar[int]


@dataclass(frozen=True, slots=True)
class Request(Message):
    """Base of all messages that are answered."""

    request: int


@dataclass(frozen=True, slots=True)
class Ack(Request):
    """The request is done. ``version``: after a Push the chunk's version; after file parts the bytes held; else 0."""

    TAG = 17
    version: int


@dataclass(frozen=True, slots=True)
class Refused(Request):
    """The request cannot be met; ``code`` is a :class:`Refusal`, ``reason`` is for people."""

    TAG = 19
    code: str
    reason: str
