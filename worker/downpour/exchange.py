"""Bringing a worker and the shards to the same weights: at the start, at the end of a pass, at the end of the job."""

from __future__ import annotations

from collections.abc import Callable

import torch

from downpour.client.parameters import ParameterClient, PushHeader
from downpour.context import WorkerContext
from downpour.space import FlatSpace
from downpour.staging import Staging
from downpour_common.layout import Chunk, Kind


class StateExchange:
    """Moves what is not pushed every step: first weights, frozen tensors, buffers.

    ``is_chief``: whether this worker is the chief at that moment.
    """

    def __init__(
        self,
        context: WorkerContext,
        space: FlatSpace,
        staging: Staging,
        client: ParameterClient,
        is_chief: Callable[[], bool],
    ) -> None:
        self._context = context
        self._is_chief = is_chief
        self._space = space
        self._staging = staging
        self._client = client
        self._seq = 0

    def start(self, restored: bool) -> int:
        """All workers begin with the same tensors: the chief's, or those that the shards hold.

        Returns the number of this worker's first contribution.
        """
        first_seq = self._seq = self._client.hello()
        layout = self._space.layout
        others = self._flats("buffer") | self._flats("frozen")
        self._staging.lend(others)
        if self._is_chief() and not restored:
            self._staging.weights_out(layout.by_kind["trainable"])
            self._client.initialise(layout.chunks)
            if self._context.worker_epoch == 0:
                return first_seq
            # A predecessor may have brought a part of its own, which counts.
        self._client.pull(layout.chunks)
        for chunk in layout.by_kind["trainable"]:
            self._staging.arrived(chunk)
        self._staging.settle()
        for index, flat in others.items():
            self._space.spread(index, flat)
        return first_seq

    def push_buffers(self, final: bool = False) -> None:
        """Tell the shards this worker's buffers, where the job's rule asks for them."""
        rule, chief = self._context.buffers, self._is_chief()
        wanted = rule == "average" or (chief and (rule == "chief" or final))
        chunks = self._buffer_chunks()
        if wanted and chunks:
            self._staging.lend(self._flats("buffer"))
            self._client.push(chunks, PushHeader(self._seq, 1, (), []))
            self._seq += 1

    def pull_buffers(self) -> None:
        """Take the job's buffers, where its rule gives them."""
        chunks = self._buffer_chunks()
        if self._context.buffers != "local" and chunks:
            flats = self._flats("buffer")
            self._staging.lend(flats)
            self._client.pull(chunks)
            for index, flat in flats.items():
                self._space.spread(index, flat)

    def _buffer_chunks(self) -> tuple[Chunk, ...]:
        return self._space.layout.by_kind["buffer"]

    def _flats(self, kind: Kind) -> dict[int, torch.Tensor]:
        return {s.index: self._space.flat_of(s.index) for s in self._space.layout.segments if s.kind == kind}
