"""What the workers of a job must agree on: the model's tensors, or the parts of them that ranks hold, and the rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

from downpour_common.dtypes import TRAINABLE, itemsize
from downpour_common.errors import ProtocolError
from downpour_common.parts import Part, check_cover, whole_of

Kind = Literal["trainable", "buffer", "frozen"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model.

    ``name`` is its first name in the state dict, ``aliases`` its further names (tied weights); ``group`` is the
    index of its optimizer parameter group, -1 where it has none.

    Where a replica of the model has several ranks, the tensor may be a ``part`` of one of the unsplit model, whose name
    it has, of that ``shape``. ``cell``: what lies together, see :func:`plan`; its column is ``cell % ranks``.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    group: int = -1
    cell: int = 0
    part: Part | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape in the unsplit model."""
        return self.shape if self.part is None else self.part.shape

    @property
    def extent(self) -> Part | None:
        """The part that it is, which may be all; None for a single number."""
        return whole_of(self.shape) if self.part is None else self.part

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * itemsize(self.dtype)

    def describe(self) -> str:
        """For error messages: what this tensor is."""
        group = f", parameter group {self.group}" if self.group >= 0 else ""
        cell = f", cell {self.cell}" if self.cell else ""
        part = ""
        if self.part is not None:
            ranges = ", ".join(f"{start}:{stop}" for start, stop in self.part.ranges)
            part = f", {ranges} along dimension {self.part.dim} of {list(self.part.shape)}"
        return f"{self.name} ({self.kind} {self.dtype}{list(self.shape)}{group}{part}{cell})"

    def to_wire(self) -> list[Any]:
        """Plain values for msgpack and JSON; what is as in an unsplit model is left out at the end."""
        row = [self.name, list(self.aliases), list(self.shape), self.dtype, self.kind, self.group]
        if self.part is not None:
            return [*row, self.cell, self.part.to_wire()]
        return [*row, self.cell] if self.cell else row


@dataclass(frozen=True)
class ModelSpec:
    """What all workers of a job must agree on: tensors, update rule, rule for buffers.

    ``rule`` is the update rule's registry name, ``options`` holds for each parameter group the options that the
    rule is made with (plain numbers, booleans and lists). ``ranks``: workers that are one replica of the model.
    ``whole``: the rule looks at whole tensors, so no trainable one is cut.
    """

    tensors: tuple[TensorSpec, ...]
    rule: str
    options: tuple[Mapping[str, Any], ...]
    buffers: str
    ranks: int = 1
    whole: bool = False

    def to_wire(self) -> dict[str, Any]:
        """A document of plain values for msgpack and JSON."""
        document: dict[str, Any] = {
            "tensors": [t.to_wire() for t in self.tensors],
            "rule": self.rule,
            "options": [dict(o) for o in self.options],
            "buffers": self.buffers,
        }
        if self.ranks != 1:
            document["ranks"] = self.ranks
        if self.whole:
            document["whole"] = True
        return document

    @classmethod
    def from_wire(cls, document: Mapping[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_wire`; raises :class:`ProtocolError` for anything malformed."""
        try:
            tensors = tuple(_tensor_from_wire(row) for row in document["tensors"])
            options = tuple(dict(row) for row in document["options"])
            rule, buffers, ranks = document["rule"], document["buffers"], document.get("ranks", 1)
            if type(ranks) is not int or ranks < 1:
                raise ValueError(f"{ranks!r} ranks")
            whole = document.get("whole", False)
            if type(whole) is not bool:
                raise ValueError(f"whole is {whole!r}")
            _check_names(tensors, ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"malformed model specification: {error!r}") from None
        if not (isinstance(rule, str) and isinstance(buffers, str)):
            raise ProtocolError("malformed model specification: rule and buffers must be strings")
        if any(t.group >= len(options) for t in tensors):
            raise ProtocolError("malformed model specification: a tensor names a parameter group that is not there")
        return cls(tensors, rule, options, buffers, ranks, whole)

    @cached_property
    def parts(self) -> dict[str, tuple[TensorSpec, ...]]:
        """By name, in the model's order, the parts of each tensor of the unsplit model."""
        found: dict[str, list[TensorSpec]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.name, []).append(tensor)
        return {name: tuple(parts) for name, parts in found.items()}

    @property
    def digest(self) -> str:
        """Hex digest of all that fixes the layout; equal digests mean interchangeable chunks."""
        document = self.to_wire()
        fixed = {"tensors": document["tensors"], "rule": self.rule, "buffers": self.buffers}
        if self.ranks != 1:
            fixed["ranks"] = self.ranks
        if self.whole:
            fixed["whole"] = True
        return hashlib.sha256(json.dumps(fixed, separators=(",", ":")).encode()).hexdigest()[:32]

    def first_difference(self, other: ModelSpec) -> str | None:
        """What first makes ``other`` a different model than this one, or None."""
        for ours, theirs in zip(self.tensors, other.tensors, strict=False):
            if ours != theirs:
                return f"expected {ours.describe()}, found {theirs.describe()}"
        if len(self.tensors) != len(other.tensors):
            longer = max(self, other, key=lambda spec: len(spec.tensors))
            extra = longer.tensors[min(len(self.tensors), len(other.tensors))]
            return f"{extra.describe()} is {'missing' if longer is self else 'not part of the job'}"
        if self.ranks != other.ranks:
            return f"expected replicas of {self.ranks} ranks, found {other.ranks}"
        if self.rule != other.rule:
            return f"expected optimizer {self.rule}, found {other.rule}"
        if self.buffers != other.buffers:
            return f"expected buffers={self.buffers!r}, found {other.buffers!r}"
        if self.whole != other.whole:
            return f"expected a rule with whole_tensors={self.whole}, found {other.whole}"
        if len(self.options) != len(other.options):
            return f"expected {len(self.options)} parameter groups, found {len(other.options)}"
        return None


def _tensor_from_wire(row: Any) -> TensorSpec:
    name, aliases, shape, dtype, kind, group, *more = row
    if not (type(name) is str and type(aliases) is list and all(type(a) is str for a in aliases)):
        raise ValueError(f"bad name or aliases in {row!r}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"bad shape {shape!r} of {name}")
    if kind not in KINDS or type(group) is not int or (group >= 0) != (kind == "trainable") or group < -1:
        raise ValueError(f"{name} cannot be {kind!r} in parameter group {group!r}")
    if itemsize(dtype) and kind == "trainable" and dtype not in TRAINABLE:
        raise ValueError(f"{name} cannot be trained as {dtype}")
    if len(more) > 2 or (more and (type(more[0]) is not int or more[0] < 0)):
        raise ValueError(f"{name} lies in {more!r}")
    part = Part.from_wire(more[1]) if len(more) == 2 else None
    if part is not None and part.local_shape != tuple(shape):
        raise ValueError(f"{name} has shape {shape}, its part of the whole has {list(part.local_shape)}")
    return TensorSpec(name, tuple(aliases), tuple(shape), dtype, kind, group, more[0] if more else 0, part)


def _check_names(tensors: tuple[TensorSpec, ...], ranks: int) -> None:
    """That names mean one tensor of the unsplit model, all of it. Raises ``ValueError``."""
    found: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        found.setdefault(tensor.name, []).append(tensor)
    names = [name for parts in found.values() for name in (parts[0].name, *parts[0].aliases)]
    if len(set(names)) < len(names):
        raise ValueError("two tensors have one name")
    for name, parts in found.items():
        if len({(t.aliases, t.dtype, t.kind, t.group) for t in parts}) > 1:
            raise ValueError(f"the parts of {name} differ in more than their place")
        if len({t.cell % ranks for t in parts}) < len(parts):
            raise ValueError(f"two parts of {name} belong to one rank")
        check_cover(name, [t.part for t in parts])
