"""Host memory of its own for a model on the CPU, so that what travels is not what is computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import torch

from downpour.space import FlatSpace, part_of
from downpour.staging import AT_ONCE, host_bytes, pushed_dtype
from downpour_common.layout import Chunk, SharedLayout


class MirrorStaging:
    """For steps that go on while a push-pull is under way: one more copy of gradients and of weights.

    ``memory``, laid out as :class:`SharedLayout`, holds both; else it is this process' own, and ``rounded`` that of
    gradients that are sent as bfloat16. See
    :class:`downpour.staging.Staging`.
    """

    mirrors = True

    def __init__(self, space: FlatSpace, memory: memoryview | None = None, rounded: bool = False) -> None:
        self._space = space
        shared = SharedLayout(space.layout)
        if memory is None:
            self._weights = {i: torch.empty_like(flat) for i, flat in space.weights.items()}
            self._sources = {
                i: torch.empty_like(flat, dtype=pushed_dtype(flat, rounded)) for i, flat in space.gradients.items()
            }
        else:
            self._weights = {
                i: part_of(memory, shared.weights_at(i), len(flat), flat.dtype) for i, flat in space.weights.items()
            }
            self._sources = {
                i: part_of(memory, shared.gradients_at(i), len(flat), flat.dtype) for i, flat in space.gradients.items()
            }

    def weights(self, chunk: Chunk) -> memoryview:
        """See :class:`downpour.staging.Staging`."""
        return host_bytes(self._space.of(self._weights, chunk))

    def gradient(self, chunk: Chunk) -> memoryview:
        """See :class:`downpour.staging.Staging`."""
        return host_bytes(self._space.of(self._sources, chunk))

    def lend(self, flats: Mapping[int, torch.Tensor]) -> None:
        """See :class:`downpour.staging.Staging`."""
        self._weights.update(flats)
        self._sources.update(flats)

    def outgoing(
        self, chunks: Sequence[Chunk], source: Mapping[int, torch.Tensor], _current: Set[int] = frozenset()
    ) -> Iterator[Sequence[Chunk]]:
        """See :class:`downpour.staging.Staging`."""
        for start in range(0, len(chunks), AT_ONCE):
            some = chunks[start : start + AT_ONCE]
            for chunk in some:
                self._space.of(self._sources, chunk).copy_(self._space.of(source, chunk))
            yield some

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """See :class:`downpour.staging.Staging`."""
        for chunk in chunks:
            self._space.of(self._weights, chunk).copy_(self._space.of(self._space.weights, chunk))

    def arrived(self, chunk: Chunk) -> None:
        """See :class:`downpour.staging.Staging`."""
        self._space.of(self._space.weights, chunk).copy_(self._space.of(self._weights, chunk))

    def settle(self) -> None:
        """See :class:`downpour.staging.Staging`."""

    # The mirror belongs to the push-pull that is under way while backward runs, so nothing is brought into it then.

    def bring(self, chunk: Chunk) -> None:
        """See :class:`downpour.staging.Staging`."""

    def brought(self) -> list[Chunk]:
        """See :class:`downpour.staging.Staging`."""
        return []

    def confirm(self) -> Set[int]:
        """See :class:`downpour.staging.Staging`."""
        return frozenset()

    def forget(self) -> None:
        """See :class:`downpour.staging.Staging`."""

    def digest(self, _chunk: Chunk) -> bytes:
        """See :class:`downpour.staging.Staging`."""
        return b""
