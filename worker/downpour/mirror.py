"""Host memory of its own for a model on the CPU, so that what travels is not what is computed with."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from downpour.space import FlatSpace, part_of
from downpour.staging import CopyingStaging
from downpour_common.layout import Chunk, SharedLayout


class MirrorStaging(CopyingStaging):
    """For steps that go on while a push-pull is under way: one more copy of gradients and of weights.

    ``memory``, laid out as :class:`SharedLayout`, holds both; else it is this process' own, and ``rounded`` that of
    gradients that are sent as bfloat16. See :class:`downpour.staging.Staging`.
    """

    mirrors = True

    def __init__(self, space: FlatSpace, memory: memoryview | None = None, rounded: bool = False) -> None:
        super().__init__(space, rounded)
        if memory is None:
            self._weights = {i: torch.empty_like(flat) for i, flat in space.weights.items()}
            return
        shared = SharedLayout(space.layout, space.column.rank)
        self._weights = {
            i: part_of(memory, shared.weights_at(i), len(flat), flat.dtype) for i, flat in space.weights.items()
        }
        self._sources = {
            i: part_of(memory, shared.gradients_at(i), len(flat), flat.dtype) for i, flat in space.gradients.items()
        }

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """See :class:`downpour.staging.Staging`."""
        for chunk in chunks:
            self._space.of(self._weights, chunk).copy_(self._space.of(self._space.weights, chunk))

    def arrived(self, chunk: Chunk) -> None:
        """See :class:`downpour.staging.Staging`."""
        self._space.of(self._space.weights, chunk).copy_(self._space.of(self._weights, chunk))

    def bring(self, chunk: Chunk) -> None:
        """See :class:`downpour.staging.Staging`; nothing is brought into memory that a push-pull still leaves from."""

    def digest(self, _chunk: Chunk) -> bytes:
        """See :class:`downpour.staging.Staging`."""
        return b""
