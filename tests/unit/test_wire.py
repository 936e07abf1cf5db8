"""Messages ↔ frames: every message comes back as it was sent, and nothing but ProtocolError comes of bad frames."""

from __future__ import annotations

import math
import struct
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import ProtocolError
from downpour_common.messages import Buffer, Document, Message

GOLDEN = Path(__file__).parent / "golden"


DECLARED = [v for v in vars(m).values() if isinstance(v, type) and issubclass(v, Message)]
MESSAGES = sorted((cls for cls in DECLARED if "TAG" in vars(cls)), key=lambda cls: cls.TAG)
WITH_PAYLOAD = [cls for cls in MESSAGES if "payload" in {f.name for f in fields(cls)}]

# ---------------------------------------------------------------- values by field type

numbers = st.integers(-1, (1 << 63) - 1)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
BY_TYPE: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, numbers),
    (float, st.floats(allow_nan=False)),
    (str, st.text(max_size=12)),
    (bytes, st.binary(max_size=12)),
    (bool, st.booleans()),
    (Document, st.dictionaries(st.text(max_size=8), plain, max_size=3)),
    (tuple[int, ...], st.lists(numbers, max_size=4).map(tuple)),
    (tuple[str, ...], st.lists(st.text(max_size=8), max_size=4).map(tuple)),
    (Buffer, st.binary(max_size=32)),
]


def _strategy(hint: Any) -> st.SearchStrategy[Any]:
    return next(strategy for known, strategy in BY_TYPE if known == hint)


def _instances(cls: type[Message]) -> st.SearchStrategy[Message]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: _strategy(hints[f.name]) for f in fields(cls)})


def _example(cls: type[Message], payload: Buffer = b"abcd") -> Message:
    """One message of the type, the same every time."""
    values = [
        (int, 300),
        (float, 0.5),
        (str, "text"),
        (bytes, b"bytes"),
        (bool, True),
        (Document, {"a": [1, {"b": None}]}),
        (tuple[int, ...], (1, 2)),
        (tuple[str, ...], ("x", "y")),
        (Buffer, payload),
    ]
    hints = typing.get_type_hints(cls)
    return cls(**{f.name: next(v for known, v in values if known == hints[f.name]) for f in fields(cls)})


EXAMPLES = [_example(cls) for cls in MESSAGES]


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is what a Document may hold."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _is_number(value: Any) -> bool:
    return type(value) is int and -1 <= value < 1 << 63


CONFORMS: list[tuple[Any, Callable[[Any], bool]]] = [
    (int, _is_number),
    (float, lambda v: type(v) in (int, float)),
    (str, lambda v: type(v) is str),
    (bytes, lambda v: type(v) is bytes),
    (bool, lambda v: type(v) is bool),
    (Document, lambda v: type(v) is dict and _is_plain(v)),
    (tuple[int, ...], lambda v: type(v) is tuple and all(map(_is_number, v))),
    (tuple[str, ...], lambda v: type(v) is tuple and all(type(x) is str for x in v)),
    (Buffer, lambda v: isinstance(v, (bytes, bytearray, memoryview))),
]


def _assert_conforms(message: Message) -> None:
    """Every field is of the type that its annotation says, deep down."""
    for name, hint in typing.get_type_hints(type(message)).items():
        if typing.get_origin(hint) is not typing.ClassVar:
            conforms = next(check for known, check in CONFORMS if known == hint)
            assert conforms(getattr(message, name)), f"{type(message).__name__}.{name}: {getattr(message, name)!r}"


# ---------------------------------------------------------------- there and back


def test_all_messages_are_found() -> None:
    """A dataclass that forgets its TAG could be neither sent nor noticed."""
    bases = {m.Message, m.Request, m.Contribution, m.Item, m.FromShard, m.WorkerRequest, m.WorkerNotice}
    assert set(DECLARED) - set(MESSAGES) == bases
    assert len({cls.TAG for cls in MESSAGES}) == len(MESSAGES) > 20


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: str(cls.__name__))
def test_message_comes_back_as_it_was_sent(cls: type[Message]) -> None:
    @settings(max_examples=20)
    @given(_instances(cls))
    def there_and_back(message: Message) -> None:
        again = wire.decode(wire.encode(message), wire.CONTROL_HEADER_LIMIT)
        assert type(again) is cls
        assert again == message
        _assert_conforms(again)

    there_and_back()


@pytest.mark.parametrize("cls", WITH_PAYLOAD, ids=lambda cls: str(cls.__name__))
def test_payload_is_neither_copied_nor_looked_at(cls: type[Message]) -> None:
    memory = bytearray(b"\x00" * 64)
    view = memoryview(memory)
    frames = wire.encode(_example(cls, view))
    assert len(frames) == 2
    assert frames[1] is view, "encoding hands the buffer on"
    received = memoryview(memory)
    decoded: Any = wire.decode([frames[0], received])
    assert decoded.payload is received, "decoding hands the frame on"
    memory[7] = 255
    assert decoded.payload[7] == 255, "both are the sender's memory"


def test_messages_without_payload_have_one_frame() -> None:
    assert len(wire.encode(m.Ack(1, 2))) == 1


def test_not_a_number_passes_where_floats_do() -> None:
    logged = wire.decode(wire.encode(m.LogMetrics(7, "j", 0, 0, 1, {"loss": math.nan, "best": -math.inf})))
    assert isinstance(logged, m.LogMetrics)
    assert math.isnan(logged.values["loss"])
    assert logged.values["best"] == -math.inf


# ---------------------------------------------------------------- the bytes themselves

CONTRIBUTION = (9, "j", 3, 1, 2, 300, 299, 70_000, 32, (4, 512), b"\x81\xa2lr\x01", b"\x00\x00\x80\x3f")
CONTRIBUTION_HEX = (
    "09"  # request
    "a16a"  # job
    "03"  # shard_epoch
    "01"  # slot
    "02"  # worker_epoch
    "cd012c"  # seq
    "cd012b"  # base_version
    "ce00011170"  # chunk
    "20"  # samples
    "9204cd0200"  # position
    "c40581a26c7201"  # hyper
)
HEADERS: dict[str, tuple[Message, str]] = {
    "Hello": (m.Hello(7, "j1", 2, 0, "ab", 5, 3), "98 01 07 a26a31 02 00 a26162 05 03"),
    "Push": (m.Push(*CONTRIBUTION), "9c 03" + CONTRIBUTION_HEX),
    "PushPull": (m.PushPull(*CONTRIBUTION), "9c 04" + CONTRIBUTION_HEX),
    "Weights": (m.Weights(128, 70_000, 1 << 40, b"\x00" * 4), "94 12 cc80 ce00011170 cf0000010000000000"),
    "Ack": (m.Ack(1, -1), "93 11 01 ff"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_bytes(name: str) -> None:
    """Another version of Downpour, or another language, must find exactly these."""
    message, expected = HEADERS[name]
    header = bytes(wire.encode(message)[0])
    assert header.hex() == expected.replace(" ", "")
    payload = [message.payload] if isinstance(message, (m.Contribution, m.Weights)) else []
    assert wire.decode([header, *payload]) == message


def _table() -> str:
    lines = []
    for cls in MESSAGES:
        hints = typing.get_type_hints(cls)
        names = [f"{f.name}:{next(n for t, n in SHORT if t == hints[f.name])}" for f in fields(cls)]
        lines.append(" ".join([str(cls.TAG), cls.__name__, *names]))
    return "\n".join(lines) + "\n"


SHORT: list[tuple[Any, str]] = [
    (int, "int"),
    (float, "float"),
    (str, "str"),
    (bytes, "bytes"),
    (bool, "bool"),
    (Document, "document"),
    (tuple[int, ...], "ints"),
    (tuple[str, ...], "strs"),
    (Buffer, "payload"),
]


def test_tags_and_fields_are_those_of_the_protocol() -> None:
    """The order of fields is the wire format. Whoever changes it changes golden/messages.txt and PROTOCOL.md too."""
    assert _table() == (GOLDEN / "messages.txt").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what is not accepted


def _hello(**fields_: Any) -> bytes:
    start: dict[str, Any] = {"tag": 1, "request": 7, "job": "j", "slot": 2, "worker_epoch": 0}
    row = {**start, "digest": "ab", "done": -1, "first": -1, **fields_}
    packed: bytes = msgpack.packb(list(row.values()))
    return packed


def _log(values: Any) -> bytes:
    packed: bytes = msgpack.packb([m.LogMetrics.TAG, 7, "j", 0, 0, 0, values])
    return packed


def _welcome(shards: Any, position: Any) -> bytes:
    packed: bytes = msgpack.packb([m.Welcome.TAG, 1, shards, False, 0, position, [0], False])
    return packed


def test_the_frames_that_the_bad_ones_are_made_from_are_sound() -> None:
    assert wire.decode([_hello()]) == m.Hello(7, "j", 2, 0, "ab")
    assert wire.decode([_log({"a": 1})]) == m.LogMetrics(7, "j", 0, 0, 0, {"a": 1})
    assert wire.decode([_welcome(["a"], [0, 1])]) == m.Welcome(1, ("a",), False, 0, (0, 1), (0,))


PULL = bytes(wire.encode(m.Pull(1, "j", 0, 0, 3))[0])
WEIGHTS = bytes(wire.encode(m.Weights(1, 2, 3, b"abcd"))[0])
BAD: dict[str, list[bytes]] = {
    "no frames": [],
    "three frames": [WEIGHTS, b"abcd", b""],
    "empty header": [b""],
    "payload missing": [WEIGHTS],
    "payload not wanted": [PULL, b"abcd"],
    "not an array": [msgpack.packb({"tag": 1})],
    "a bare number": [msgpack.packb(5)],
    "empty array": [msgpack.packb([])],
    "tag not a number": [msgpack.packb(["1", 7])],
    "tag a boolean": [msgpack.packb([True, 7, "j", 2, 0, "ab"])],
    "tag unknown": [msgpack.packb([99])],
    "tag negative": [msgpack.packb([-1])],
    "too few fields": [msgpack.packb([1, 7, "j", 2, 0])],
    "too many fields": [msgpack.packb([1, 7, "j", 2, 0, "ab", 0, 0, 0])],
    "bytes after the array": [_hello() + b"\x00"],
    "cut short": [_hello()[:-1]],
    "never-used byte": [b"\xc1"],
    "number a boolean": [_hello(slot=True)],
    "number a float": [_hello(slot=2.0)],
    "number a string": [_hello(slot="2")],
    "number missing": [_hello(slot=None)],
    "number below -1": [_hello(slot=-2)],
    "number of 64 bits": [_hello(slot=1 << 63)],
    "text a number": [_hello(job=3)],
    "text bytes": [_hello(job=b"j")],
    "text not utf-8": [_hello(job="XY").replace(b"XY", b"\xff\xfe")],
    "document a list": [_log([1])],
    "document nothing": [_log(None)],
    "document with a number for a key": [_log({1: 2})],
    "document with bytes for a key": [_log({b"a": 2})],
    "document with bytes in it": [_log({"a": b"raw"})],
    "document with bytes deep in it": [_log({"a": [{"b": [b"raw"]}]})],
    "strings not strings": [_welcome([1], [])],
    "strings a string": [_welcome("ab", [])],
    "numbers not numbers": [_welcome([], ["0"])],
    "numbers with a boolean": [_welcome([], [True])],
    "numbers with one below -1": [_welcome([], [0, -2])],
    "extension type for a field": [_hello(slot=msgpack.ExtType(5, b"x"))],
    "extension type in a document": [_log({"a": msgpack.ExtType(5, b"x")})],
    "extension type for the whole": [msgpack.packb(msgpack.ExtType(5, b"x"))],
    "timestamp for a field": [_hello(slot=msgpack.Timestamp(1))],
    "timestamp in a document": [_log({"a": msgpack.Timestamp(1, 2)})],
    "timestamp deep in a document": [_log({"a": [[msgpack.Timestamp(1, 2)]]})],
    "array that claims four billion": [b"\xdd\xff\xff\xff\xff"],
    "bytes that claim four billion": [b"\x92\x01\xc6\xff\xff\xff\xff"],
    "arrays without end": [b"\x91" * 60_000],
    "maps without end": [b"\x81\xa1a" * 20_000],
}


@pytest.mark.parametrize("what", BAD)
def test_bad_frames_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(BAD[what])


def test_minus_one_and_63_bits_are_accepted() -> None:
    assert wire.decode([_hello(slot=-1)]) == m.Hello(7, "j", -1, 0, "ab")
    assert wire.decode([_hello(slot=(1 << 63) - 1)]) == m.Hello(7, "j", (1 << 63) - 1, 0, "ab")


def test_an_error_names_the_message_and_the_field() -> None:
    with pytest.raises(ProtocolError, match=r"Hello\.worker_epoch"):
        wire.decode([_hello(worker_epoch="0")])


@pytest.mark.parametrize("limit", [wire.DATA_HEADER_LIMIT, 100])
def test_headers_up_to_the_limit_are_accepted(limit: int) -> None:
    overhead = len(wire.encode(m.Refused(1, "", "x" * 70_000))[0]) - 70_000
    reason = "x" * (limit - overhead)
    if len(wire.encode(m.Refused(1, "", reason))[0]) < limit:  # msgpack writes short lengths in fewer bytes
        reason += "x" * (limit - len(wire.encode(m.Refused(1, "", reason))[0]))
    fits, longer = m.Refused(1, "", reason), m.Refused(1, "", reason + "x")
    assert len(wire.encode(fits)[0]) == limit
    assert wire.decode(wire.encode(fits), limit) == fits
    with pytest.raises(ProtocolError, match=str(limit)):
        wire.decode(wire.encode(longer), limit)


def test_the_data_limit_is_the_default() -> None:
    long = m.Refused(1, "", "x" * wire.DATA_HEADER_LIMIT)
    with pytest.raises(ProtocolError, match="limit"):
        wire.decode(wire.encode(long))
    assert wire.decode(wire.encode(long), wire.CONTROL_HEADER_LIMIT) == long


# ---------------------------------------------------------------- anything at all


def _decode_or_refuse(frames: Sequence[wire.Frame]) -> None:
    try:
        message = wire.decode(frames)
    except ProtocolError:
        return
    _assert_conforms(message)


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    _decode_or_refuse(frames)


wild = st.recursive(
    plain
    | st.binary(max_size=4)
    | st.floats()
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
    | st.builds(msgpack.Timestamp, st.integers(0, 1 << 33), st.integers(0, 999_999_999)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=3) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.sampled_from(EXAMPLES), wild, st.data())
def test_a_valid_header_with_a_strange_field_raises_nothing_but_protocol_errors(
    message: Message, value: Any, data: st.DataObject
) -> None:
    header, *payload = wire.encode(message)
    row = msgpack.unpackb(header)
    row[data.draw(st.integers(0, len(row) - 1))] = value
    _decode_or_refuse([msgpack.packb(row), *payload])


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_valid_header_with_damaged_bytes_raises_nothing_but_protocol_errors(
    message: Message, data: st.DataObject
) -> None:
    encoded, *payload = wire.encode(message)
    header = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(header)))
        match data.draw(st.sampled_from(["set", "insert", "cut"])):
            case "set" if at < len(header):
                header[at] = data.draw(st.integers(0, 255))
            case "insert":
                header[at:at] = data.draw(st.binary(min_size=1, max_size=6))
            case _:
                del header[at : at + data.draw(st.integers(1, 6))]
    _decode_or_refuse([bytes(header), *payload])


@given(st.binary(max_size=60))
def test_unpack_raises_nothing_but_protocol_errors(data: bytes) -> None:
    try:
        wire.unpack(data)
    except ProtocolError:
        pass


@given(st.dictionaries(st.text(max_size=8), plain, max_size=4))
def test_plain_values_survive_pack_and_unpack(value: dict[str, Any]) -> None:
    assert wire.unpack(wire.pack(value)) == value
    assert wire.unpack(memoryview(wire.pack(value))) == value


def test_unpack_refuses_extension_types_and_timestamps() -> None:
    for extension in (msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2)):
        with pytest.raises(ProtocolError):
            wire.unpack(msgpack.packb([extension]))
    with pytest.raises(ProtocolError):
        wire.unpack(b"\xd6\xff" + struct.pack(">I", 1))


@pytest.mark.parametrize("limit", [wire.CONTROL_HEADER_LIMIT])
def test_only_messages_that_describe_a_model_may_have_a_large_header(limit: int) -> None:
    document = {"text": "x" * (2 << 20)}
    large = m.RegisterWorker(1, "job", 0, 0, 1, document)
    assert wire.decode(wire.encode(large), limit) == large
    with pytest.raises(ProtocolError, match="limit is 1048576"):
        wire.decode(wire.encode(m.ShardReport("job", 0, 0, document)), limit)
    with pytest.raises(ProtocolError, match="limit is 1048576"):
        wire.decode([b"\xdd\x00\x20\x00\x00" + b"\xc0" * (2 << 20)], limit)
