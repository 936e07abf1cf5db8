"""Vectors of mode ``lbfgs`` that lie on a shard, and the operations on them; see :mod:`downpour_common.vectors`.

What is promised: a command is carried out once, however often it comes, and the answer to the newest is kept. Of each
(evaluation, portion) one gradient counts per chunk. Gradients are added up in float64, so the order of their arrival
changes a sum by no more than float64's rounding, which the weights' float32 hardly ever shows. Products are of float64,
too, chunk by chunk in the order of the chunks; all other vectors have the weights' dtype, but at least float32.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.messages import Refusal
from downpour_common.vectors import POINT, TRIAL, WEIGHTS, Op, operations, packed, unpacked
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk
from downpour_server.tensors import from_bytes, is_finite

Vector = dict[int, torch.Tensor]
"""A shard's part of a vector, by chunk."""


class Vectors:
    """The vectors over these trainable chunks."""

    def __init__(self, chunks: Collection[StoredChunk]) -> None:
        self._chunks = {stored.chunk.index: stored for stored in chunks}
        self._held: dict[int, Vector] = {}
        self._attempt = 0
        self._number = 0
        self._answer = b""
        self._evaluation = -1
        self._counted: set[tuple[int, int]] = set()
        """(portion, chunk) of the evaluation"""
        self.portions = 0
        """portions' gradients of chunks that have counted since the start"""
        self.dropped = 0
        """… and that have not, because another worker was first or the evaluation was over"""

    def execute(self, command: m.VectorOps) -> tuple[int, int, bool, bytes] | None:
        """Carry a command out; returns the last fields of :class:`m.VectorsDone`, None for one that is over.

        Raises :class:`ProtocolError` for what makes no sense.
        """
        this, newest = (command.attempt, command.number), (self._attempt, self._number)
        if this < newest:
            return None
        begins = command.number == 1 and command.attempt > self._attempt
        follows = this == (self._attempt, self._number + 1) and bool(self._number)
        if begins or follows:
            results = self._run(command.ops, unpacked(command.scalars))
            self._attempt, self._number, self._answer = *this, packed(results)
        elif this != newest:
            return *this, True, b""
        return *this, False, self._answer

    def add(self, chunk: int, evaluation: int, portion: int, gradient: torch.Tensor) -> bool:
        """Add a portion's gradient of one chunk; whether it counts."""
        counts = evaluation == self._evaluation and (portion, chunk) not in self._counted
        if counts:
            self._counted.add((portion, chunk))
            self._held[TRIAL][chunk].add_(gradient)
            self.portions += 1
        else:
            self.dropped += 1
        return counts

    # ------------------------------------------------------------ operations

    def _run(self, ops: tuple[int, ...], scalars: list[float]) -> list[float]:
        results: list[float] = []
        at, written = 0, False
        for op, target, first, last in operations(ops):
            count = 1 if op is Op.SCALE else last - first + 1 if op is Op.AXPY else 0
            factors = scalars[at : at + count]
            at += count
            if len(factors) != count:
                raise ProtocolError("a vector operation lacks a scalar")
            if op in (Op.DOT, Op.MAXABS):
                results += self._reduce(op, target, first, last)
            else:
                written |= self._change(op, target, first, factors)
        if written:
            for stored in self._chunks.values():
                stored.version += 1
        return results

    def _change(self, op: Op, target: int, first: int, factors: list[float]) -> bool:
        """Whether the weights have changed."""
        match op:
            case Op.BEGIN:
                point = self._held.get(POINT)
                self._held = {POINT: self._copy(WEIGHTS) if point is None else point}
                self._keep_for_snapshots()
                target = WEIGHTS
                self._write(POINT)
            case Op.EVALUATE:
                self._evaluation = target
                self._counted.clear()
                wide = torch.float64
                self._held[TRIAL] = {i: torch.zeros(s.chunk.numel, dtype=wide) for i, s in self._chunks.items()}
                return False
            case Op.COPY if target == WEIGHTS:
                self._write(first)
            case Op.COPY:
                self._held[target] = self._copy(first)
                if target == POINT:
                    self._keep_for_snapshots()
            case Op.ZERO:
                self._held[target] = {i: torch.zeros_like(t) for i, t in self._copy(WEIGHTS).items()}
            case Op.SCALE:
                for part in self._changing(target).values():
                    part.mul_(factors[0])
            case Op.AXPY:
                for number, factor in enumerate(factors, first):
                    source = self._vector(number)
                    for index, part in self._changing(target).items():
                        part.add_(source[index], alpha=factor)
        return target == WEIGHTS

    def _reduce(self, op: Op, target: int, first: int, last: int) -> list[float]:
        vector = self._vector(target)
        if op is Op.MAXABS:
            parts = [part.abs().max().item() for part in vector.values() if part.numel()]
            return [max(map(float, parts), default=0.0)]
        sums = [0.0] * (last - first + 1)
        for index, part in vector.items():
            wide = part.double()
            for place in range(len(sums)):
                sums[place] += float(torch.dot(wide, self._vector(first + place)[index].double()))
        return sums

    def _vector(self, name: int) -> Vector:
        if name == WEIGHTS:
            return {index: stored.weights for index, stored in self._chunks.items()}
        try:
            return self._held[name]
        except KeyError:
            raise ProtocolError(f"there is no vector {name} here") from None

    def _changing(self, name: int) -> Vector:
        """The vector, to be written to."""
        if name == WEIGHTS:
            return {index: stored.writable() for index, stored in self._chunks.items()}
        return self._vector(name)

    def _write(self, source: int) -> None:
        """The weights are this vector from now on."""
        values = self._vector(source)
        for index, part in self._changing(WEIGHTS).items():
            part.copy_(values[index])

    def _copy(self, name: int) -> Vector:
        """Memory of its own; at least float32, of the weights' dtype otherwise."""
        return {
            index: part.to(torch.promote_types(self._chunks[index].weights.dtype, torch.float32), copy=True)
            for index, part in self._vector(name).items()
        }

    def _keep_for_snapshots(self) -> None:
        """A snapshot holds the point reached, not what a line search tries. The point is replaced, never written to."""
        for index, part in self._held[POINT].items():
            stored = self._chunks[index]
            stored.reached = part.to(stored.weights.dtype)


def take_portion(vectors: Vectors | None, stored: StoredChunk, push: m.PushPortion, stats: ShardStats) -> m.Message:
    """The answer to a worker's gradient of a portion, which is as long as the chunk; it has been added if it counts."""
    gradient = from_bytes(push.payload, stored.chunk.dtype)
    if vectors is None or not stored.trainable or push.samples < 1:
        reason = f"portion {push.portion} of worker/{push.slot} to chunk {push.chunk} makes no sense"
        return m.Refused(push.request, Refusal.MALFORMED.value, reason)
    if not is_finite(gradient):  # which its worker would have told the coordinator instead
        reason = f"portion {push.portion} of worker/{push.slot} holds NaN or Inf"
        return m.Refused(push.request, Refusal.NON_FINITE.value, reason)
    stats.applied += vectors.add(push.chunk, push.evaluation, push.portion, gradient)
    stats.bytes_in += stored.nbytes
    return m.Ack(push.request, stored.version)
