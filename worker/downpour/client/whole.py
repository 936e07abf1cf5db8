"""The unsplit model on one worker's host, put together from what its ranks push and pull."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from downpour.staging import host_bytes
from downpour_common.layout import Chunk, Layout, Segment
from downpour_common.parts import overlaps, whole_of

if TYPE_CHECKING:
    from downpour.client.parameters import ParameterClient


class Whole:
    """``tensors``: of the unsplit model, by name, filled segment by segment as the parts of them come in."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.tensors = {
            name: torch.zeros(parts[0].whole_shape, dtype=getattr(torch, parts[0].dtype))
            for name, parts in layout.model.parts.items()
        }

    def take(self, segment: Segment, flat: torch.Tensor) -> None:
        """A segment's elements."""
        for piece in segment.pieces:
            spec = self._layout.model.tensors[piece.tensor]
            part, whole = flat[piece.start : piece.stop].view(spec.shape), self.tensors[spec.name]
            for to, at in overlaps(whole_of(spec.whole_shape), spec.extent):
                whole[to] = part[at]


def whole_tensors(layout: Layout, flats: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the unsplit model, by name; ``flats``: flat, by segment, all of them."""
    whole = Whole(layout)
    for segment in layout.segments:
        whole.take(segment, flats[segment.index])
    return whole.tensors


def pull_whole(client: ParameterClient, layout: Layout) -> dict[str, torch.Tensor]:
    """The newest tensors of the unsplit model, by name, from the shards. Holds one segment beside them at a time."""
    whole = Whole(layout)
    for segment in layout.segments:
        flat = torch.empty(segment.numel, dtype=getattr(torch, segment.dtype))

        def place(chunk: Chunk, flat: torch.Tensor = flat) -> memoryview:
            return host_bytes(flat[chunk.start : chunk.stop])

        client.pull_of((c for c in layout.chunks if c.segment == segment.index), place)
        whole.take(segment, flat)
    return whole.tensors
