"""The complete state of a shard, as bytes and back: what a new follower starts from.

:data:`STATE` says of every attribute of everything that makes up a shard whether it is carried. A test compares it
with the objects themselves, so that a new attribute cannot be forgotten.

::

    8 bytes   length of the document, most significant byte first
    document  msgpack: plain values; tensors are numbers into "tensors", [dtype, elements] each
    tensors   one after the other, raw

Nothing is stopped for it: weights and the rule's state are taken by reference, and updates go to copies until they
have been read (``StoredChunk.capture``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from downpour_common import wire
from downpour_common.errors import ProtocolError
from downpour_common.messages import Buffer
from downpour_server.captures import Captures
from downpour_server.coding import ChunkCoding
from downpour_server.compensation.bases import Bases
from downpour_server.compensation.compensator import Compensator
from downpour_server.contribution import Contribution
from downpour_server.contributions import Contributions
from downpour_server.dedup import DedupWindow
from downpour_server.endings import Endings
from downpour_server.epochs import Epochs
from downpour_server.fetches import Fetches
from downpour_server.greeting import Greeting
from downpour_server.members import Members
from downpour_server.noise import NoiseMeter
from downpour_server.passes import Passes, Trail
from downpour_server.policy.asynchronous import AsyncGate
from downpour_server.policy.exchanges import ExchangeGate
from downpour_server.policy.rounds import RoundGate
from downpour_server.policy.stale import StaleGate
from downpour_server.policy.synchronous import SyncGate
from downpour_server.refusals import Refusals
from downpour_server.settling import Settling
from downpour_server.shard import Shard
from downpour_server.snapshot import Reading
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk
from downpour_server.tensors import as_bytes, torch_dtype
from downpour_server.updates import Updates

PART_BYTES = 1 << 20
TOGETHER_BYTES = 64 << 10
"""Smaller tensors are gathered into one part, which costs a copy."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Attributes of a class, by what becomes of them."""

    carried: frozenset[str]
    """encoded, and set at the other end"""
    apart: frozenset[str]
    """carried in a way of their own"""
    own: frozenset[str]
    """the same at the other end by construction, or of connections, of which a follower has none"""


def _fields(carried: str = "", apart: str = "", own: str = "") -> Fields:
    return Fields(frozenset(carried.split()), frozenset(apart.split()), frozenset(own.split()))


STATE: dict[type, Fields] = {
    Shard: _fields(
        apart="chunks stats noise _members _gates _passes _trail _captures _settling _updates",
        own="identity layout _columns _trainable _mode _timeout_s _fetches _endings _epochs _greeting _contributions "
        "_refusals _attached _lodging _staged vectors _stays_home",
    ),
    Captures: _fields("_position", own="open _job _shard _chunks _gates _numbered _stats"),
    Settling: _fields("recovered", own="_members _columns _stats"),
    Updates: _fields("unaligned", own="_chunks _columns _fetches _endings _captures _stats _noise"),
    Fetches: _fields(own="waiting _chunks _gates _members _columns _attached _lodging _stats _refusals"),
    Endings: _fields(own="waiting _members _refusals"),
    Refusals: _fields(own="_chunks _stats"),
    Epochs: _fields(
        own="_chunks _trainable _gates _members _columns _passes _trail _endings _updates _captures _numbered"
    ),
    Greeting: _fields(
        own="_shard _digest _gates _members _columns _passes _trail _settling _updates _captures _refusals _numbered"
    ),
    Contributions: _fields(
        own="shard_epoch _chunks _gates _members _columns _attached _lodging _staged _trail _settling _fetches "
        "_updates _captures _stats _refusals _skips _pushed _pushed_bytes"
    ),
    Members: _fields("first_seq version _epochs _over _ended _left _awaited", own="_take_over"),
    Passes: _fields("ended _over _open"),
    Trail: _fields("_steps"),
    ShardStats: _fields(
        "staleness applied repeats refused bytes_in bytes_out staged clock_gap_max updates round _reported_round "
        "lost lost_pushes non_finite late _lost _last_void _last_late slots uncompensated"
    ),
    NoiseMeter: _fields("_sums _held", own="_wanted _scratch"),
    StoredChunk: _fields(
        "version initialised previous_version _windows _latest",
        "weights _rule _hyper _previous _compensator coding",
        "chunk trainable nbytes lodging _keep_previous _scratch _options _understood _readers _state_readers "
        "reached _previous_readers",
    ),
    ChunkCoding: _fields(apart="residuals _number _views", own="_chunk _push _pull follows _together _step _whole"),
    Compensator: _fields(apart="bases _way", own="_lr _factor"),
    Bases: _fields("kept", own="_most"),
    AsyncGate: _fields(),
    StaleGate: _fields("_done", own="_bound _members _lead"),
    SyncGate: _fields("_queues _applied", own="_members"),
    RoundGate: _fields("_queues _orphans _answered", own="_backup _members _chunk _too_late"),
    ExchangeGate: _fields("_queues _late _orphans _next _absent _over _answered", own="_members"),
}
_VALUES: dict[str, type[Any]] = {cls.__name__: cls for cls in (Contribution, DedupWindow)}
"""Dataclasses that are carried field by field."""
_UNCHANGING = frozenset({"_queues", "_late", "_orphans", "_latest", "kept"})
"""Attributes whose tensors are replaced, never written to, and so need no copy."""


def attributes(thing: object) -> set[str]:
    """The names of all attributes that an object has."""
    names = set(getattr(thing, "__dict__", ()))
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names.update([slots] if isinstance(slots, str) else slots)
    return names


# ---------------------------------------------------------------- taking


class Image:
    """A shard's state at the moment this is made. ``reading`` is to be told when the parts have been read."""

    def __init__(self, shard: Shard, reading: Reading) -> None:
        self._tensors: list[torch.Tensor] = []
        self._borrowed = {id(g) for memory in shard._attached.values() for g in memory._gradients.values()}
        document = {
            "captures": self._carried(shard._captures),
            "settling": self._carried(shard._settling),
            "updates": self._carried(shard._updates),
            "members": self._carried(shard._members),
            "stats": self._carried(shard.stats),
            "noise": self._carried(shard.noise),
            "passes": self._carried(shard._passes),
            "trail": {} if shard._trail is None else self._carried(shard._trail),
            "chunks": [[index, *self._chunk(shard, index, reading)] for index in shard.chunks],
        }
        shapes = [[str(t.dtype).removeprefix("torch."), t.numel()] for t in self._tensors]
        packed = wire.pack({"state": document, "tensors": shapes})
        self._head = len(packed).to_bytes(8, "big") + packed

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return len(self._head) + sum(t.nbytes for t in self._tensors)

    def parts(self) -> Iterator[tuple[Buffer, bool]]:
        """The bytes, at most :data:`PART_BYTES` at a time, and whether it is the last part."""
        held: Buffer | None = None
        for part in self._pieces():
            if held is not None:
                yield held, False
            held = part
        assert held is not None
        yield held, True

    def _pieces(self) -> Iterator[Buffer]:
        gathered = bytearray()
        for whole in (memoryview(self._head), *map(as_bytes, self._tensors)):
            for at in range(0, whole.nbytes, PART_BYTES):
                piece = whole[at : at + PART_BYTES]
                if piece.nbytes >= TOGETHER_BYTES:
                    if gathered:
                        yield gathered
                        gathered = bytearray()
                    yield piece
                    continue
                gathered += piece
                if len(gathered) >= TOGETHER_BYTES:
                    yield gathered
                    gathered = bytearray()
        if gathered:
            yield gathered

    def _chunk(self, shard: Shard, index: int, reading: Reading) -> list[Any]:
        stored = shard.chunks[index]
        tensors, row = stored.capture(reading)
        numbers = {name: self._number(tensor) for name, tensor in tensors.items()}
        if stored._previous is not None:
            numbers["previous"] = self._number(stored._previous)
            stored.being_read(reading, previous=True)
        own = {**self._carried(stored), "_hyper": self._encode(stored._hyper, False)}
        own["bases"] = {} if stored.bases is None else self._carried(stored.bases)
        return [own, self._carried(shard._gates[index]), numbers, row["scalars"]]

    def _carried(self, thing: object) -> dict[str, Any]:
        names = sorted(STATE[type(thing)].carried)
        return {name: self._encode(getattr(thing, name), name not in _UNCHANGING) for name in names}

    def _number(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _encode(self, value: Any, changing: bool) -> Any:
        """Plain values stay; everything else becomes a list that begins with its kind. ``changing``: tensors may be
        written to before they are read."""
        match value:
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                return ["bytes", value.hex()]
            case torch.Tensor():
                copied = changing or id(value) in self._borrowed
                return ["tensor", self._number(value.clone() if copied else value)]
            case Counter() | dict():
                flat = [self._encode(x, changing) for pair in value.items() for x in pair]
                return ["counter" if isinstance(value, Counter) else "dict", flat]
            case deque():
                return ["deque", value.maxlen, [self._encode(x, changing) for x in value]]
            case list() | tuple():
                return [type(value).__name__, [self._encode(x, changing) for x in value]]
            case set() | frozenset():
                return [type(value).__name__, [self._encode(x, changing) for x in sorted(value)]]
        name = type(value).__name__
        if _VALUES.get(name) is not type(value):
            raise TypeError(f"a shard's state holds a {name}, which nobody knows how to carry")
        return ["value", name, [self._encode(getattr(value, f.name), changing) for f in fields(value)]]


# ---------------------------------------------------------------- giving back


class Received:
    """The bytes of an :class:`Image`, as they come in."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._document: dict[str, Any] | None = None
        self._tensors: list[torch.Tensor] = []
        self._place = 0
        """tensor that is being filled"""
        self._at = 0
        """its bytes that are there"""

    def take(self, part: Buffer) -> None:
        """The next bytes. Raises :class:`ProtocolError` when they cannot be such a state."""
        rest = memoryview(part)
        while rest.nbytes:
            rest = self._take_head(rest) if self._document is None else self._fill(rest)

    def load(self, shard: Shard) -> None:
        """Give ``shard``, which is as new, the state. Raises :class:`ProtocolError` when some of it is missing."""
        if self._document is None or self._place < len(self._tensors):
            raise ProtocolError("the state of a shard is not complete")
        document = self._document
        self._set(shard._captures, document["captures"])
        self._set(shard._settling, document["settling"])
        self._set(shard._updates, document["updates"])
        self._set(shard._members, document["members"])
        self._set(shard.stats, document["stats"])
        self._set(shard.noise, document["noise"])
        self._set(shard._passes, document["passes"])
        if shard._trail is not None:
            self._set(shard._trail, document["trail"])
        for index, own, gate, numbers, scalars in document["chunks"]:
            stored, parts = shard.chunks[index], {name: self._tensors[n] for name, n in numbers.items()}
            stored._previous = parts.pop("previous", None)
            stored.restore(parts.pop("weights"), {**parts, **scalars}, 0)
            stored.adopt(self._decode(own.pop("_hyper")))
            bases = own.pop("bases")
            if stored.bases is not None:
                self._set(stored.bases, bases)
            self._set(stored, own)
            self._set(shard._gates[index], gate)

    def _take_head(self, rest: memoryview) -> memoryview:
        length = 8 + int.from_bytes(self._head[:8], "big") if len(self._head) >= 8 else 8
        wanted = length - len(self._head)
        self._head += rest[:wanted]
        if len(self._head) == length > 8:
            document = wire.unpack(bytes(self._head[8:]))
            self._document = document["state"]
            self._tensors = [torch.empty(numel, dtype=torch_dtype(name)) for name, numel in document["tensors"]]
            self._skip_empty()
        return rest[wanted:]

    def _fill(self, rest: memoryview) -> memoryview:
        if self._place == len(self._tensors):
            raise ProtocolError("the state of a shard is longer than it says")
        target = as_bytes(self._tensors[self._place])
        count = min(rest.nbytes, target.nbytes - self._at)
        target[self._at : self._at + count] = rest[:count]
        self._at += count
        if self._at == target.nbytes:
            self._place, self._at = self._place + 1, 0
            self._skip_empty()
        return rest[count:]

    def _skip_empty(self) -> None:
        while self._place < len(self._tensors) and not self._tensors[self._place].nbytes:
            self._place += 1

    def _set(self, thing: object, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(thing, name, self._decode(value))

    def _decode(self, value: Any) -> Any:
        match value:
            case ["bytes", text]:
                return bytes.fromhex(text)
            case ["tensor", number]:
                return self._tensors[number]
            case ["counter" | "dict" as kind, flat]:
                plain = [self._decode(x) for x in flat]
                pairs = dict(zip(plain[::2], plain[1::2], strict=True))
                return Counter(pairs) if kind == "counter" else pairs
            case ["deque", longest, items]:
                return deque((self._decode(x) for x in items), longest)
            case ["list" | "tuple" | "set" | "frozenset" as kind, items]:
                return _SEQUENCES[kind](self._decode(x) for x in items)
            case ["value", name, items]:
                return _VALUES[name](*[self._decode(x) for x in items])
        return value


_SEQUENCES: dict[str, type[Any]] = {cls.__name__: cls for cls in (list, tuple, set, frozenset)}
