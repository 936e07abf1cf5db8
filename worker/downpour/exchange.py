"""Bringing a worker and the shards to the same weights: at the start, at the end of a pass, at the end of the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from downpour import takeover
from downpour.client.parameters import ParameterClient, PushHeader
from downpour.context import WorkerContext
from downpour.joining import join
from downpour.space import FlatSpace
from downpour.staging import Staging
from downpour.takeover import Beginning
from downpour_common.errors import PeerRefused
from downpour_common.layout import KINDS, Chunk, Kind
from downpour_common.messages import Refusal


class StateExchange:
    """Moves what is not pushed every step: first weights, frozen tensors, buffers.

    ``is_chief``: whether this worker is the chief at that moment, or a rank of the chief's replica, which brings what
    is of its own column. ``agreed``: of a number that every rank of the replica has, the greatest; ``together``: the
    beginning of all of them, from that of this one.
    """

    def __init__(
        self,
        context: WorkerContext,
        space: FlatSpace,
        staging: Staging,
        client: ParameterClient,
        is_chief: Callable[[], bool],
        agreed: Callable[[int], int] = int,
        together: Callable[[Beginning], Beginning] = lambda begins: begins,
    ) -> None:
        self._context = context
        self._is_chief = is_chief
        self._agreed = agreed
        self._together = together
        self._space = space
        self._staging = staging
        self._client = client
        self._seq = 0

    def start(self, restored: bool) -> Beginning:
        """All workers begin with the same tensors: the chief's, or those that the shards hold."""
        begins = takeover.fresh(self._client.hello(), self._space.column)
        begins = replace(begins, seq=self._agreed(begins.seq))  # its ranks step, and so count, together
        self._begin(begins)
        others = self._lend_others()
        if self._is_chief() and not restored:
            self._initialise()
            if self._context.worker_epoch == 0:
                return begins
            # A predecessor may have brought a part of its own, which counts.
        self._fetch(*KINDS)
        self._arrived(others)
        return begins

    def take_part(self, begins: Beginning) -> Beginning:
        """Have rounds wait for this worker from the open one on; see :func:`downpour.joining.join`."""
        number = join(self._client, self._space.column, self._agreed, begins.seq)
        if number > begins.seq:  # what was fetched is of a round that is over
            self._fetch("trainable")
            self._arrived({})
        return replace(begins, seq=number)

    def take_over(self, restored: bool, leave_point: Callable[[], None]) -> Beginning:
        """Begin where the worker has died whose place this one takes, with the weights of that round.

        If that one was through with a pass, this is said for it first. ``leave_point`` as in :meth:`ClientThread.wait`.
        """
        column = self._space.column
        begins = self._together(takeover.taken_over(self._client.hello(), column))
        self._begin(begins)
        others = self._lend_others()
        if self._is_chief() and not restored:
            self._initialise()
        self._fetch("buffer", "frozen")
        self._arrived(others)
        if begins.finished is not None:
            if begins.ended != (0, begins.finished):
                self.push_buffers()
            self._client.end_epoch(0, begins.finished, leave_point)
            # Some shards may have been past that end, and others not: now all are.
            begins = replace(begins, seq=self._together(takeover.taken_over(self._client.hello(), column)).seq)
            self._client.begin_at(begins.seq)
            self.pull_buffers()
        self._pull_round(begins.seq)
        self._arrived({})
        return begins

    def _begin(self, begins: Beginning) -> None:
        self._client.begin_at(begins.seq)
        self._seq = begins.buffers

    def _lend_others(self) -> dict[int, torch.Tensor]:
        """Host memory for buffers and frozen tensors."""
        others = self._flats("buffer") | self._flats("frozen")
        self._staging.lend(others)
        return others

    def _initialise(self) -> None:
        column = self._space.column
        self._staging.weights_out(column.by_kind["trainable"])
        self._client.initialise(column.chunks)

    def _fetch(self, *kinds: Kind) -> None:
        """Bring what there is of ``kinds`` to the host; waits for the job's first weights if need be."""
        self._client.pull(chunk for chunk in self._space.column.chunks if chunk.kind in kinds)

    def _arrived(self, others: dict[int, torch.Tensor]) -> None:
        """Bring to the model what has been fetched."""
        for chunk in self._space.column.by_kind["trainable"]:
            self._staging.arrived(chunk)
        self._staging.settle()
        for index, flat in others.items():
            self._space.spread(index, flat)

    def _pull_round(self, number: int) -> None:
        chunks = self._space.column.by_kind["trainable"]
        try:
            self._client.start_pull(chunks, version=number).wait()
        except PeerRefused as error:
            if error.code != Refusal.STALE_SEQ:
                raise
            # The rounds went on without one who had ended its pass: it has none to make anew.
            self._client.pull(chunks)

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
        return self._space.column.by_kind["buffer"]

    def _flats(self, kind: Kind) -> dict[int, torch.Tensor]:
        return {s.index: self._space.flat_of(s.index) for s in self._space.column.segments if s.kind == kind}
