"""What the ranks of a replica hold of the unsplit model, and the parameter space that they make up together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch

from downpour_common import wire
from downpour_common.errors import ModelError
from downpour_common.layout import ModelSpec, Part, TensorSpec

Sharing = Literal["same", "sum"]


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of the unsplit model, as far as this rank holds it.

    ``name``: its first name in the unsplit model's state dict. ``tensor``: the parameter or buffer of this rank's
    module, perhaps a ``DTensor``. ``part``: which part of the whole it is; None: all of it. ``sharing``: what it means
    if other ranks of the replica hold the same part: their gradients are the ``same`` (tensor parallelism, replicated),
    or are each a term of a ``sum`` (tied weights in several stages). The lowest such rank pushes and pulls it, and the
    others get it from there.
    """

    name: str
    tensor: torch.Tensor
    part: Part | None = None
    sharing: Sharing = "same"


@dataclass(frozen=True, slots=True)
class Shared:
    """A part that several ranks hold: ``ranks`` ascending, the first of which owns it."""

    name: str
    ranks: tuple[int, ...]
    sharing: Sharing


@dataclass(frozen=True, slots=True)
class Space:
    """The parameter space of a replica: ``spec`` for the servers, ``shared`` for what several ranks hold."""

    spec: ModelSpec
    shared: tuple[Shared, ...]


def encode(held: Iterable[Held]) -> bytes:
    """What a rank tells the others."""
    return wire.pack([[h.name, h.part.to_wire() if h.part else None, h.sharing] for h in held])


Row = tuple[str, Part | None, Sharing]


def decode(data: bytes) -> list[Row]:
    """The inverse of :func:`encode`, without the tensors."""
    rows: list[Row] = []
    for name, part, sharing in cast(list[list[Any]], wire.unpack(data)):
        rows.append((name, Part.from_wire(part) if part else None, sharing))
    return rows


def assemble(whole: ModelSpec, ranks: Sequence[Sequence[Row]]) -> Space:
    """The parameter space of the unsplit model ``whole``, of which each of ``ranks`` holds what it says.

    Raises :class:`ModelError` for a tensor that nobody holds.
    """
    holders: dict[str, dict[Part | None, tuple[list[int], Sharing]]] = {}
    for rank, rows in enumerate(ranks):
        for name, part, sharing in rows:
            holders.setdefault(name, {}).setdefault(part, ([], sharing))[0].append(rank)
    tensors: list[TensorSpec] = []
    shared: list[Shared] = []
    for tensor in whole.tensors:
        if tensor.name not in holders:
            raise ModelError(f"{tensor.name} is held by no rank of the replica: the plan has no place for its module")
        for part, (at, sharing) in holders[tensor.name].items():
            shape = tensor.shape if part is None else part.local_shape
            tensors.append(replace(tensor, shape=shape, part=part, cell=at[0]))
            if len(at) > 1:
                shared.append(Shared(tensor.name, tuple(at), sharing))
    return Space(replace(whole, tensors=tuple(tensors), ranks=len(ranks)), tuple(shared))


def of_rank(held: Iterable[Held], shared: Iterable[Shared], rank: int) -> Mapping[str, torch.Tensor]:
    """By name, the tensors that this rank pushes and pulls."""
    others = {s.name for s in shared if rank in s.ranks and s.ranks[0] != rank}
    return {h.name: h.tensor for h in held if h.name not in others}
