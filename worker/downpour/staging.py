"""From device memory to the wire and back.

On a CPU the flat tensors are what is sent and received. On a GPU each has a pinned mirror on the host; copies
run on a side stream, chunk by chunk, so that the first chunk is on the wire while the next is being copied,
and a chunk that has come back is on its way to the device while others are still awaited.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol

import numpy as np
import torch

from downpour.space import FlatSpace
from downpour_common import wire
from downpour_common.dtypes import pushed_as
from downpour_common.layout import Chunk

AT_ONCE = 8
"""Chunks that are submitted together; while they are under way the next ones are prepared."""
_NONE: Set[int] = frozenset()


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

    def outgoing(
        self, chunks: Sequence[Chunk], source: Mapping[int, torch.Tensor], current: Set[int] = _NONE
    ) -> Iterator[Sequence[Chunk]]:
        """Chunks in order, as many at a time as have their part of ``source`` in :meth:`gradient`'s memory.

        ``current``: those that have it there already, by index.
        """

    def bring(self, chunk: Chunk) -> None:
        """Begin to bring the chunk's gradient, as it is now, to :meth:`gradient`'s memory."""

    def brought(self) -> list[Chunk]:
        """The chunks that are there by now, each once."""

    def confirm(self) -> Set[int]:
        """The chunks brought since this was asked last whose memory is what their gradient is now, or whose
        :meth:`digest` tells; by index. Waits for those under way."""

    def forget(self) -> None:
        """What has been brought, or is under way, is not asked for any more."""

    def digest(self, chunk: Chunk) -> bytes:
        """See ``client.parameters.Memory``."""

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """Bring the weights of trainable chunks to the host."""

    def arrived(self, chunk: Chunk) -> None:
        """The host memory of the chunk's weights has been filled."""

    def settle(self) -> None:
        """Order all arrived weights before what the caller does next."""


class HostMemory:
    """Flat host tensors by segment: of ``weights``, and of ``sources``, from which contributions leave."""

    def __init__(self, space: FlatSpace, weights: dict[int, torch.Tensor], sources: dict[int, torch.Tensor]) -> None:
        self._space = space
        self._weights = weights
        self._sources = sources

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


class HostStaging(HostMemory):
    """For models on the CPU: no copies at all."""

    mirrors = False

    def __init__(self, space: FlatSpace) -> None:
        super().__init__(space, dict(space.weights), dict(space.gradients))
        self._brought: list[Chunk] = []
        self._current: set[int] = set()

    def outgoing(
        self, chunks: Sequence[Chunk], source: Mapping[int, torch.Tensor], current: Set[int] = _NONE
    ) -> Iterator[Sequence[Chunk]]:
        """See :class:`Staging`."""
        self._sources.update(source)
        for start in range(0, len(chunks), AT_ONCE if current else max(1, len(chunks))):
            yield chunks[start : start + AT_ONCE] if current else chunks

    def bring(self, chunk: Chunk) -> None:
        """See :class:`Staging`."""
        self._brought.append(chunk)
        self._current.add(chunk.index)

    def brought(self) -> list[Chunk]:
        """See :class:`Staging`."""
        brought, self._brought = self._brought, []
        return brought

    def confirm(self) -> Set[int]:
        """See :class:`Staging`; the digest tells."""
        current, self._current = self._current, set()
        return current

    def forget(self) -> None:
        """See :class:`Staging`."""
        self._brought.clear()
        self._current.clear()

    def digest(self, chunk: Chunk) -> bytes:
        """See :class:`Staging`."""
        return wire.digest(self.gradient(chunk))

    def weights_out(self, chunks: Iterable[Chunk]) -> None:
        """See :class:`Staging`."""

    def arrived(self, chunk: Chunk) -> None:
        """See :class:`Staging`."""

    def settle(self) -> None:
        """See :class:`Staging`."""


class CopyingStaging(HostStaging):
    """For models on the CPU whose gradients leave from memory of their own, ``rounded``: fp32 as bfloat16."""

    def __init__(self, space: FlatSpace, rounded: bool) -> None:
        super().__init__(space)
        self._sources = {
            i: torch.empty_like(flat, dtype=pushed_dtype(flat, rounded)) for i, flat in space.gradients.items()
        }

    def outgoing(
        self, chunks: Sequence[Chunk], source: Mapping[int, torch.Tensor], _current: Set[int] = _NONE
    ) -> Iterator[Sequence[Chunk]]:
        """See :class:`Staging`; what is there already is rounded again, so that :meth:`digest` is of what is now."""
        for start in range(0, len(chunks), AT_ONCE):
            some = chunks[start : start + AT_ONCE]
            for chunk in some:
                self._space.of(self._sources, chunk).copy_(self._space.of(source, chunk))
            yield some

    def bring(self, chunk: Chunk) -> None:
        """See :class:`Staging`."""
        self._space.of(self._sources, chunk).copy_(self._space.of(self._space.gradients, chunk))
        super().bring(chunk)


class CudaStaging(HostMemory):
    """For models on a GPU: pinned mirrors and a side stream."""

    mirrors = True

    def __init__(self, space: FlatSpace, rounded: bool = False) -> None:
        super().__init__(
            space,
            {i: _pinned(flat) for i, flat in space.weights.items()},
            {i: _pinned(flat, dtype=pushed_dtype(flat, rounded)) for i, flat in space.gradients.items()},
        )
        self._stream = torch.cuda.Stream(space.device)
        self._factors: dict[torch.dtype, torch.Tensor] = {}
        self._holds = False
        self._coming: deque[tuple[Chunk, torch.cuda.Event]] = deque()
        self._prints: dict[int, tuple[Chunk, torch.Tensor]] = {}

    def outgoing(
        self, chunks: Sequence[Chunk], source: Mapping[int, torch.Tensor], current: Set[int] = _NONE
    ) -> Iterator[Sequence[Chunk]]:
        """See :class:`Staging`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._space.device))
        copied: list[tuple[Chunk, torch.cuda.Event | None]] = []
        with torch.cuda.stream(self._stream):
            for chunk in chunks:
                copied.append((chunk, None if chunk.index in current else self._copy_out(chunk, source)))
        for chunk, event in copied:
            if event is not None:
                event.synchronize()
            yield [chunk]

    def _copy_out(self, chunk: Chunk, source: Mapping[int, torch.Tensor]) -> torch.cuda.Event:
        target = self._space.of(self._sources, chunk)
        target.copy_(self._space.of(source, chunk), non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def bring(self, chunk: Chunk) -> None:
        """See :class:`Staging`; what the script does to gradients once backward is over waits for the copies."""
        self._stream.wait_stream(torch.cuda.current_stream(self._space.device))
        with torch.cuda.stream(self._stream):
            self._prints[chunk.index] = (chunk, self._fingerprint(chunk))
            self._coming.append((chunk, self._copy_out(chunk, self._space.gradients)))
        if not self._holds:
            self._holds = True
            torch.autograd.Variable._execution_engine.queue_callback(self._hold_others)

    def _hold_others(self) -> None:
        """At the end of a backward."""
        self._holds = False
        torch.cuda.current_stream(self._space.device).wait_stream(self._stream)

    def brought(self) -> list[Chunk]:
        """See :class:`Staging`."""
        brought = []
        while self._coming and self._coming[0][1].query():
            brought.append(self._coming.popleft()[0])
        return brought

    def confirm(self) -> Set[int]:
        """See :class:`Staging`; compares fingerprints of then and now, with one copy to the host for all."""
        self._coming.clear()
        self._holds = False
        if not self._prints:
            return _NONE
        then, self._prints = list(self._prints.values()), {}
        self._stream.wait_stream(torch.cuda.current_stream(self._space.device))
        with torch.cuda.stream(self._stream):
            now = torch.stack([self._fingerprint(chunk) for chunk, _ in then])
            same: list[bool] = (now == torch.stack([fingerprint for _, fingerprint in then])).tolist()
        self._stream.synchronize()
        return {chunk.index for (chunk, _), unchanged in zip(then, same, strict=True) if unchanged}

    def forget(self) -> None:
        """See :class:`Staging`."""
        self._coming.clear()
        self._prints.clear()
        self._holds = False

    def digest(self, _chunk: Chunk) -> bytes:
        """See :class:`Staging`; the mirror is this class' own, and filled before it is sent."""
        return b""

    def _fingerprint(self, chunk: Chunk) -> torch.Tensor:
        """The bits of the chunk's gradient, each word times an odd random factor, summed modulo 2^64."""
        flat = self._space.of(self._space.gradients, chunk)
        words = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
        factors = self._factors.get(words.dtype)
        if factors is None or len(factors) < len(words):
            most = self._space.layout.chunk_bytes // words.element_size() + 1
            drawn = np.random.default_rng().integers(-(1 << 62), 1 << 62, max(most, len(words))) * 2 + 1
            factors = self._factors[words.dtype] = torch.from_numpy(drawn).to(flat.device)
        return (words * factors[: len(words)]).sum()

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


def _pinned(flat: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(flat.shape, dtype=dtype or flat.dtype, pin_memory=True)


def pushed_dtype(flat: torch.Tensor, rounded: bool) -> torch.dtype:
    """As which dtype a gradient is sent; see :func:`downpour_common.dtypes.pushed_as`."""
    name = pushed_as(str(flat.dtype).removeprefix("torch."), "bfloat16" if rounded else "same")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def staging_for(space: FlatSpace, rounded: bool = False) -> Staging:
    """The staging for the device of ``space``; ``rounded``: fp32 gradients are sent as bfloat16."""
    if space.device.type == "cuda":
        return CudaStaging(space, rounded)
    return CopyingStaging(space, rounded) if rounded else HostStaging(space)
