"""From device memory to the wire and back.

On a CPU the flat tensors are what is sent and received. On a GPU each has a pinned mirror on the host; copies
run on a side stream, chunk by chunk, so that the first chunk is on the wire while the next is being copied,
and a chunk that has come back is on its way to the device while others are still awaited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch

from downpour.space import FlatSpace
from downpour_common.layout import Chunk


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat contiguous host tensor."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


class Staging(Protocol):
    """Host memory of chunks (see ``client.parameters.Memory``), and when it may be read and has been filled.

    ``mirrors``: host memory is not the model's own, so :meth:`arrived` must be called for each chunk.
    """

    mirrors: bool

    def weights(self, chunk: Chunk) -> memoryview:
        """Host memory of the chunk's weights."""

    def gradient(self, chunk: Chunk) -> memoryview:
        """Host memory of the chunk's contribution."""

    def lend(self, flats: Mapping[int, torch.Tensor]) -> None:
        """Use these flat tensors as host memory for segments that are not trainable."""

    def outgoing(self, chunks: Iterable[Chunk], source: Mapping[int, torch.Tensor]) -> Iterator[list[Chunk]]:
        """Chunks in order, as many at a time as have their part of ``source`` in :meth:`gradient`'s memory."""

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """Bring the weights of trainable chunks to the host."""

    def arrived(self, chunk: Chunk) -> None:
        """The host memory of the chunk's weights has been filled."""

    def settle(self) -> None:
        """Order all arrived weights before what the caller does next."""


class HostStaging:
    """For models on the CPU: no copies at all."""

    mirrors = False

    def __init__(self, space: FlatSpace) -> None:
        self._space = space
        self._weights = dict(space.weights)
        self._sources: dict[int, torch.Tensor] = dict(space.gradients)

    def weights(self, chunk: Chunk) -> memoryview:
        """See :class:`Staging`."""
        return host_bytes(self._space.of(self._weights, chunk))

    def gradient(self, chunk: Chunk) -> memoryview:
        """See :class:`Staging`."""
        return host_bytes(self._space.of(self._sources, chunk))

    def lend(self, flats: Mapping[int, torch.Tensor]) -> None:
        """See :class:`Staging`."""
        self._weights.update(flats)
        self._sources.update(flats)

    def outgoing(self, chunks: Iterable[Chunk], source: Mapping[int, torch.Tensor]) -> Iterator[list[Chunk]]:
        """See :class:`Staging`."""
        self._sources.update(source)
        yield list(chunks)

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """See :class:`Staging`."""

    def arrived(self, chunk: Chunk) -> None:
        """See :class:`Staging`."""

    def settle(self) -> None:
        """See :class:`Staging`."""


class CudaStaging:
    """For models on a GPU: pinned mirrors and a side stream."""

    mirrors = True

    def __init__(self, space: FlatSpace) -> None:
        self._space = space
        self._stream = torch.cuda.Stream(space.device)
        self._weights = {i: _pinned(flat) for i, flat in space.weights.items()}
        self._sources = {i: _pinned(flat) for i, flat in space.gradients.items()}

    def weights(self, chunk: Chunk) -> memoryview:
        """See :class:`Staging`."""
        return host_bytes(self._space.of(self._weights, chunk))

    def gradient(self, chunk: Chunk) -> memoryview:
        """See :class:`Staging`."""
        return host_bytes(self._space.of(self._sources, chunk))

    def lend(self, flats: Mapping[int, torch.Tensor]) -> None:
        """See :class:`Staging`."""
        self._weights.update(flats)
        self._sources.update(flats)

    def outgoing(self, chunks: Iterable[Chunk], source: Mapping[int, torch.Tensor]) -> Iterator[list[Chunk]]:
        """See :class:`Staging`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._space.device))
        copied: list[tuple[Chunk, torch.cuda.Event]] = []
        with torch.cuda.stream(self._stream):
            for chunk in chunks:
                target = self._space.of(self._sources, chunk)
                target.copy_(self._space.of(source, chunk), non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._stream)
                copied.append((chunk, event))
        for chunk, event in copied:
            event.synchronize()
            yield [chunk]

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """See :class:`Staging`."""
        for chunk in chunks:
            self._space.of(self._weights, chunk).copy_(self._space.of(self._space.weights, chunk))

    def arrived(self, chunk: Chunk) -> None:
        """See :class:`Staging`; kernels that still read the old weights come first."""
        self._stream.wait_stream(torch.cuda.current_stream(self._space.device))
        with torch.cuda.stream(self._stream):
            target = self._space.of(self._space.weights, chunk)
            target.copy_(self._space.of(self._weights, chunk), non_blocking=True)

    def settle(self) -> None:
        """See :class:`Staging`; waits for the copies, because the next answers overwrite the mirrors."""
        self._stream.synchronize()


def _pinned(flat: torch.Tensor) -> torch.Tensor:
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)


def staging_for(space: FlatSpace) -> Staging:
    """The staging for the device of ``space``."""
    return CudaStaging(space) if space.device.type == "cuda" else HostStaging(space)
