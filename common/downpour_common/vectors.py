"""The language in which L-BFGS has shards compute with vectors: operations on named vectors, scalars in, scalars out.

A vector is as long as the model's trainable parameters, and each shard has its part of it; no other process ever sees
one (Sandblaster: Dean et al. 2012, section 4.2). A message of the coordinator's holds any number of operations, four
numbers each::

    BEGIN     -        -      -      the point is the weights, or, where there is one, the weights are it; nothing else
    EVALUATE  number   -      -      the trial's gradient is zero; portions of this evaluation add to it from now on
    COPY      target   first  -      target := first
    ZERO      target   -      -      target := 0
    SCALE     target   -      -      target := c target                                one scalar
    AXPY      target   first  last   target := target + Σ c_v v,  v = first … last     a scalar each
    DOT       target   first  last   target · v,  v = first … last                     a result each
    MAXABS    target   -      -      largest |element| of target                       one result

Scalars and results are float64. Results of all shards are added up, in the order of the shards; of MAXABS the largest
counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum

from downpour_common.errors import ProtocolError

WEIGHTS, POINT, DIRECTION, GRADIENT, TRIAL = range(5)
"""What workers fetch; the point reached; the direction searched along; the gradient there, and at the weights."""
FIRST_PAIR = 8
"""The vectors from here on are pairs of the history, all s before all y."""


class Op(IntEnum):
    """See the module."""

    BEGIN = 0
    EVALUATE = 1
    COPY = 2
    ZERO = 3
    SCALE = 4
    AXPY = 5
    DOT = 6
    MAXABS = 7


class Commands:
    """Operations to be carried out in one go, and their scalars."""

    def __init__(self) -> None:
        self.ops: list[int] = []
        self.scalars: list[float] = []

    def begin(self) -> Commands:
        """See :attr:`Op.BEGIN`."""
        return self._add(Op.BEGIN)

    def evaluate(self, number: int) -> Commands:
        """See :attr:`Op.EVALUATE`."""
        return self._add(Op.EVALUATE, number)

    def copy(self, target: int, source: int) -> Commands:
        """See :attr:`Op.COPY`."""
        return self._add(Op.COPY, target, source)

    def zero(self, target: int) -> Commands:
        """See :attr:`Op.ZERO`."""
        return self._add(Op.ZERO, target)

    def scale(self, target: int, factor: float) -> Commands:
        """See :attr:`Op.SCALE`."""
        self.scalars.append(factor)
        return self._add(Op.SCALE, target)

    def axpy(self, target: int, first: int, factors: Sequence[float]) -> Commands:
        """See :attr:`Op.AXPY`; nothing for no factors."""
        if not factors:
            return self
        self.scalars += factors
        return self._add(Op.AXPY, target, first, first + len(factors) - 1)

    def dot(self, target: int, first: int, count: int = 1) -> Commands:
        """See :attr:`Op.DOT`; nothing for a ``count`` of 0."""
        return self._add(Op.DOT, target, first, first + count - 1) if count else self

    def maxabs(self, target: int) -> Commands:
        """See :attr:`Op.MAXABS`."""
        return self._add(Op.MAXABS, target)

    def _add(self, op: Op, *numbers: int) -> Commands:
        self.ops += (op, *numbers, *[0] * (3 - len(numbers)))
        return self


def operations(ops: Sequence[int]) -> Iterator[tuple[Op, int, int, int]]:
    """``ops`` by fours. Raises :class:`ProtocolError` for what is no operation."""
    if len(ops) % 4:
        raise ProtocolError("vector operations have four numbers each")
    for at in range(0, len(ops), 4):
        op, target, first, last = ops[at : at + 4]
        if not 0 <= op < len(Op) or min(target, first, last) < 0 or last - first > FIRST_PAIR + 2000:
            raise ProtocolError(f"{op} {target} {first} {last} is no vector operation")
        yield Op(op), target, first, last


def together(ops: Sequence[int], parts: Sequence[Sequence[float]]) -> list[float]:
    """The results of ``ops``, from those of each shard, in the order of the shards.

    Raises :class:`ProtocolError` where a shard has another number of them than it should.
    """
    largest: list[bool] = []
    for op, _, first, last in operations(ops):
        if op is Op.DOT:
            largest += [False] * (last - first + 1)
        elif op is Op.MAXABS:
            largest.append(True)
    if any(len(part) != len(largest) for part in parts):
        raise ProtocolError(f"{len(largest)} results are due of each shard")
    return [
        max(column) if is_max else sum(column) for is_max, column in zip(largest, zip(*parts, strict=True), strict=True)
    ]


def packed(numbers: Sequence[float]) -> bytes:
    """float64 each, least significant byte first."""
    return struct.pack(f"<{len(numbers)}d", *numbers)


def unpacked(data: bytes) -> list[float]:
    """The inverse of :func:`packed`. Raises :class:`ProtocolError`."""
    if len(data) % 8:
        raise ProtocolError("scalars have 8 bytes each")
    return list(struct.unpack(f"<{len(data) // 8}d", data))
