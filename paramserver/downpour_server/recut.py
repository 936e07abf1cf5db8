"""Where the elements of a checkpoint are, by tensor: for layouts that cut the model in other parts than it does.

One tensor of the unsplit model is looked at at a time, so that what is held beside the shard's own is twice the largest
part of one, however large the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from downpour_common.errors import CheckpointError
from downpour_common.layout import Chunk, Layout, TensorSpec
from downpour_common.parts import overlaps
from downpour_common.tensorfile import TensorFile
from downpour_server.tensors import from_bytes

Row = tuple[str, Mapping[str, Any]]
"""A chunk's file, and what the manifest says of it."""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``first`` to ``first + count`` of a tensor of a layout are those of ``chunk`` from ``at`` on."""

    chunk: Chunk
    first: int
    at: int
    count: int


def spans_of(layout: Layout) -> dict[TensorSpec, list[Span]]:
    """Where the elements of each tensor, or part of one, are."""
    found: dict[TensorSpec, list[Span]] = {tensor: [] for tensor in layout.model.tensors}
    for chunk in layout.chunks:
        for tensor, first, at, count in layout.pieces_of(chunk):
            found[tensor].append(Span(chunk, first, at, count))
    return found


@dataclass(slots=True)
class Gathered:
    """What a checkpoint has of some elements: tensors by name (``weights`` and the rule's), scalars, version."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    version: int = 0

    def note(self, row: Mapping[str, Any], same_rule: bool) -> None:
        """Scalars and version are the largest of what is gathered."""
        self.version = max(self.version, row["version"])
        for scalar, value in row["scalars"].items() if same_rule else ():
            self.scalars[scalar] = max(value, self.scalars.get(scalar, value))


class Origin:
    """A checkpoint's chunks, to be read from its open ``files``. ``same_rule``: the rule's state is of use."""

    def __init__(
        self, layout: Layout, rows: Mapping[int, Row], files: Mapping[str, TensorFile], same_rule: bool
    ) -> None:
        self._spans = spans_of(layout)
        self._parts = layout.model.parts
        self._rows = rows
        self._files = files
        self._same_rule = same_rule
        self._names: dict[int, list[str]] = {}
        for name, file in files.items():
            for key in file:
                index, _, what = key.partition(".")
                if index.isdecimal() and rows.get(int(index), ("",))[0] == name:
                    self._names.setdefault(int(index), []).append(what)

    def same(self, tensor: TensorSpec) -> TensorSpec | None:
        """The part that the checkpoint's layout has of just these elements, in the same order."""
        return next((t for t in self._parts[tensor.name] if t.extent == tensor.extent), None)

    def copy(self, tensor: TensorSpec, first: int, count: int, at: int, into: Gathered, numel: int) -> None:
        """Bring elements ``first`` to ``first + count`` of a part of the checkpoint's layout to place ``at`` of tensors
        of ``numel`` elements. Raises :class:`CheckpointError`."""
        for span in self._spans[tensor]:
            low, high = max(first, span.first), min(first + count, span.first + span.count)
            if low >= high:
                continue
            for what, source in self._read(span.chunk, into):
                target = into.tensors.setdefault(what, torch.zeros(numel, dtype=source.dtype))
                start, to = span.at + low - span.first, at + low - first
                target[to : to + high - low] = source[start : start + high - low]

    def recut(self, tensor: TensorSpec) -> Gathered:
        """All elements of a part that the checkpoint's layout does not have as one. Raises :class:`CheckpointError`."""
        made = Gathered()
        for old in self._parts[tensor.name]:
            boxes = list(overlaps(tensor.extent, old.extent))
            if not (boxes and old.numel and tensor.numel):
                continue
            theirs = Gathered()
            self.copy(old, 0, old.numel, 0, theirs, old.numel)
            made.note({"version": theirs.version, "scalars": theirs.scalars}, True)
            for what, source in theirs.tensors.items():
                target = made.tensors.setdefault(what, torch.zeros(tensor.numel, dtype=source.dtype))
                for to, at in boxes:
                    target.view(tensor.shape)[to] = source.view(old.shape)[at]
        return made

    def _read(self, chunk: Chunk, into: Gathered) -> Iterator[tuple[str, torch.Tensor]]:
        name, row = self._rows[chunk.index]
        names = self._names.get(chunk.index, [])
        if "weights" not in names:
            raise CheckpointError(self._files[name].path, f"does not hold the weights of chunk {chunk.index}")
        into.note(row, self._same_rule)
        for what in names:
            if self._same_rule or what == "weights":
                key = f"{chunk.index}.{what}"
                yield what, from_bytes(self._files[name][key], self._files[name].heads[key].dtype)


def needed(
    layout: Layout, tensor: TensorSpec, spans: Mapping[TensorSpec, list[Span]], first: int, count: int
) -> set[int]:
    """The chunks of a checkpoint's layout that elements of ``tensor``, which is of another layout, come from."""
    found: set[int] = set()
    for old in layout.model.parts[tensor.name]:
        if old.extent == tensor.extent:
            return {s.chunk.index for s in spans[old] if s.first < first + count and first < s.first + s.count}
        if any(True for _ in overlaps(tensor.extent, old.extent)):
            found |= {span.chunk.index for span in spans[old]}
    return found
