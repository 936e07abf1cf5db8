"""Parts of a tensor: which elements of it one rank of a replica holds, and how parts cut in different ways meet.

Free of torch: an index that is given here is a tuple of slices, for whatever holds the elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Index = tuple[slice, ...]
Strip = tuple[int, int, int]
"""Along a part's ``dim``: where it begins in the part, where in the whole tensor, and its length."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a tensor of the unsplit model: of ``shape``, along ``dim`` the ``ranges`` (start, stop), laid one
    after another.

    Its elements lie in the C order of these ranges, joined along ``dim``.
    """

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part itself."""
        shape = list(self.shape)
        shape[self.dim] = sum(stop - start for start, stop in self.ranges)
        return tuple(shape)

    @property
    def strips(self) -> list[Strip]:
        """The ranges, with where they lie in the part."""
        found, at = [], 0
        for start, stop in self.ranges:
            found.append((at, start, stop - start))
            at += stop - start
        return found

    def index(self, start: int, length: int) -> Index:
        """Of the elements ``start``, ``start + 1``, … along ``dim``."""
        return (slice(None),) * self.dim + (slice(start, start + length),)

    def to_wire(self) -> list[Any]:
        """Plain values for msgpack and JSON."""
        return [list(self.shape), self.dim, [list(r) for r in self.ranges]]

    @classmethod
    def from_wire(cls, row: Any) -> Part:
        """The inverse of :meth:`to_wire`. Raises ``ValueError`` and ``TypeError`` for what is no part of a tensor."""
        shape, dim, ranges = row
        if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"bad shape {shape!r} of a whole tensor")
        if type(dim) is not int or not 0 <= dim < len(shape):
            raise ValueError(f"a part along dimension {dim!r} of {shape}")
        for start, stop in ranges:
            if not (type(start) is int and type(stop) is int and 0 <= start <= stop <= shape[dim]):
                raise ValueError(f"a part {start!r} to {stop!r} of {shape} along dimension {dim}")
        return cls(tuple(shape), dim, tuple((start, stop) for start, stop in ranges))


def whole_of(shape: Sequence[int]) -> Part | None:
    """All of a tensor, as a part of it; None where it has no dimension to be cut along."""
    return Part(tuple(shape), 0, ((0, shape[0]),)) if shape else None


def overlaps(one: Part | None, other: Part | None) -> Iterator[tuple[Index, Index]]:
    """The elements that two parts of one tensor have in common: the same ones by their index in each, box by box.

    None: the tensor is a single number.
    """
    if one is None or other is None:
        yield (), ()
        return
    for at, start, length in one.strips:
        for other_at, other_start, other_length in other.strips:
            if one.dim != other.dim:
                yield (
                    _box(one.dim, at, other.dim, other_start, length, other_length),
                    _box(one.dim, start, other.dim, other_at, length, other_length),
                )
                continue
            low, high = max(start, other_start), min(start + length, other_start + other_length)
            if low < high:
                yield (
                    one.index(at + low - start, high - low),
                    other.index(other_at + low - other_start, high - low),
                )


def _box(dim: int, start: int, other_dim: int, other_start: int, length: int, other_length: int) -> Index:
    slices = [slice(None)] * (max(dim, other_dim) + 1)
    slices[dim] = slice(start, start + length)
    slices[other_dim] = slice(other_start, other_start + other_length)
    return tuple(slices)


def check_cover(name: str, parts: Sequence[Part | None]) -> None:
    """That the parts of the tensor ``name`` are all of it, once. Raises ``ValueError``."""
    first = parts[0]
    if len(parts) == 1 and first is None:
        return
    if first is None or None in parts:
        raise ValueError(f"{name} is there as a whole and once more")
    ranges: list[tuple[int, int]] = []
    for part in parts:
        assert part is not None
        if (part.shape, part.dim) != (first.shape, first.dim):
            raise ValueError(f"the parts of {name} are cut along different dimensions, or of different tensors")
        ranges += part.ranges
    at = 0
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if start != at:
            raise ValueError(
                f"elements {min(at, start)} to {max(at, start)} of {name} along dimension {first.dim} "
                f"{'have no part' if start > at else 'are in two parts'}"
            )
        at = stop
    if at != first.shape[first.dim]:
        raise ValueError(f"elements {at} to {first.shape[first.dim]} of {name} have no part")
