"""Messages ↔ frames. Pure functions; no sockets.

::

    frame 0   header    msgpack array [TAG, field, field, …] in the order of the dataclass' fields
    frame 1   payload   raw bytes of the message's Buffer field, only for messages that have one

Decoding allocates nothing for the payload, checks every field against its annotation and refuses unknown
tags, extra frames, extension types, documents nested too deeply and headers above the plane's limit, with
:class:`ProtocolError`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import msgpack
import xxhash

from downpour_common import messages
from downpour_common.errors import ProtocolError
from downpour_common.messages import Buffer, Document, Message

DATA_HEADER_LIMIT = 64 << 10
"""Largest header in bytes between worker and shard."""
CONTROL_HEADER_LIMIT = 64 << 20
"""Largest header in bytes to and from the coordinator: a model's specification may name many tensors."""
SMALL_HEADER_LIMIT = 1 << 20
"""Largest header in bytes of messages other than those few that may be large."""

Frame = bytes | bytearray | memoryview

_INT_MIN, _INT_MAX = -1, (1 << 63) - 1
_DEEPEST = 32
"""Lists and maps within each other in a document; without a limit, a few hundred would exhaust Python's stack."""


def _is_int(value: Any) -> bool:
    return type(value) is int and _INT_MIN <= value <= _INT_MAX


def _is_plain(value: Any, deepest: int = _DEEPEST) -> bool:
    if type(value) is dict:
        return deepest > 0 and all(type(key) is str and _is_plain(item, deepest - 1) for key, item in value.items())
    if type(value) is list:
        return deepest > 0 and all(_is_plain(item, deepest - 1) for item in value)
    return value is None or type(value) in (bool, int, float, str)


_CHECKS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: lambda v: type(v) in (float, int),
    str: lambda v: type(v) is str,
    bytes: lambda v: type(v) is bytes,
    bool: lambda v: type(v) is bool,
    Document: lambda v: type(v) is dict and _is_plain(v),
    tuple[int, ...]: lambda v: type(v) is list and all(map(_is_int, v)),
    tuple[str, ...]: lambda v: type(v) is list and all(type(x) is str for x in v),
}


class _Shape:
    """How one message type lies in its frames."""

    def __init__(self, cls: type[Message]) -> None:
        hints = typing.get_type_hints(cls)
        self.cls = cls
        self.header = [f.name for f in fields(cls) if hints[f.name] != Buffer]
        self.has_payload = any(hints[f.name] == Buffer for f in fields(cls))
        self.checks = [_CHECKS[hints[name]] for name in self.header]
        self.tuples = [i for i, name in enumerate(self.header) if typing.get_origin(hints[name]) is tuple]
        if self.has_payload and fields(cls)[-1].name != "payload":
            raise TypeError(f"{cls.__name__}: the Buffer field must be the last and be called payload")


def _all_messages() -> dict[int, _Shape]:
    shapes: dict[int, _Shape] = {}
    for value in vars(messages).values():
        if isinstance(value, type) and issubclass(value, Message) and "TAG" in vars(value):
            if value.TAG in shapes:
                raise TypeError(f"tag {value.TAG} is used twice")
            shapes[value.TAG] = _Shape(value)
    return shapes


_SHAPES = _all_messages()
_BY_TYPE: dict[type[Message], _Shape] = {shape.cls: shape for shape in _SHAPES.values()}

_MAY_BE_LARGE = {c.TAG for c in (messages.RegisterWorker, messages.SetUpShard, messages.SnapshotTaken, messages.Reply)}
"""Messages that describe every tensor or chunk of a model, or every job of a cluster."""


def encode(message: Message) -> list[Frame]:
    """``message`` as frames; the payload frame is the message's own buffer, not a copy."""
    shape = _BY_TYPE[type(message)]
    header: bytes = msgpack.packb([message.TAG, *[getattr(message, name) for name in shape.header]])
    return [header, message.payload] if shape.has_payload else [header]  # type: ignore[attr-defined]


def decode(frames: Sequence[Frame], header_limit: int = DATA_HEADER_LIMIT) -> Message:
    """The message in ``frames``; the payload stays the frame given. Raises :class:`ProtocolError`."""
    if not frames or len(frames) > 2:
        raise ProtocolError(f"a message has 1 or 2 frames, found {len(frames)}")
    header = frames[0]
    if len(header) > SMALL_HEADER_LIMIT and _tag_of(header) not in _MAY_BE_LARGE:
        header_limit = min(header_limit, SMALL_HEADER_LIMIT)
    if len(header) > header_limit:
        raise ProtocolError(f"header of {len(header)} bytes; the limit is {header_limit}")
    values = _unpack(header)
    if type(values) is not list or not values or type(values[0]) is not int:
        raise ProtocolError("header is not an array that begins with a tag")
    shape = _SHAPES.get(values[0])
    if shape is None:
        raise ProtocolError(f"unknown message tag {values[0]}")
    del values[0]
    name = shape.cls.__name__
    if len(values) != len(shape.header):
        raise ProtocolError(f"{name} has {len(shape.header)} header fields, found {len(values)}")
    if shape.has_payload != (len(frames) == 2):
        raise ProtocolError(f"{name} {'needs a' if shape.has_payload else 'has no'} payload frame")
    for field, check, value in zip(shape.header, shape.checks, values, strict=True):
        if not check(value):
            raise ProtocolError(f"{name}.{field}: unacceptable value of type {type(value).__name__}")
    for i in shape.tuples:
        values[i] = tuple(values[i])
    if shape.has_payload:
        values.append(frames[1])
    return shape.cls(*values)


def digest(payload: Frame) -> bytes:
    """By which two sides tell whether they mean the same payload: 64-bit XXH3, no proof against malice."""
    return xxhash.xxh3_64_digest(payload)


def _tag_of(header: Frame) -> int:
    """The tag of a header, from its first bytes; -1 for one that no encoder here makes."""
    start = bytes(header[:3])
    if 0x91 <= start[0] <= 0x9F and start[1] < 0x80:
        return start[1]
    return -1


def pack(value: Any) -> bytes:
    """Plain values as msgpack."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: Frame) -> Any:
    """The inverse of :func:`pack`; raises :class:`ProtocolError`."""
    value = _unpack(data)
    if not _is_plain(value):
        raise ProtocolError("values other than null, booleans, numbers, strings, lists and maps with string keys")
    return value


def _unpack(data: Frame) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=_no_extensions, raw=False)
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not msgpack: {type(error).__name__}") from None


def _no_extensions(code: int, _data: bytes) -> typing.Never:
    raise ProtocolError(f"msgpack extension type {code} is not accepted")
