"""Where a worker begins, from what the shards answer to its greeting. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from downpour_common.layout import Column
from downpour_common.messages import HelloReply


@dataclass(frozen=True, slots=True)
class Beginning:
    """Numbers of a worker's first contributions, and what it knows of one whose place it takes."""

    seq: int
    """to trainable chunks"""
    buffers: int
    """to buffers"""
    position: tuple[int, int] | None = None
    """(epoch, offset) of the training data, as the predecessor has told the shards; None: it has told nothing"""
    ended: tuple[int, ...] = ()
    """(loader, epoch) of the pass that the predecessor has ended last: it has sent its buffers before"""

    @property
    def finished(self) -> int | None:
        """The pass over the first loader that the predecessor had no more samples of, if it had none of the next."""
        if self.position is None or self.position[1] or not self.position[0]:
            return None
        return self.position[0] - 1


def fresh(replies: Sequence[HelloReply], column: Column) -> Beginning:
    """The beginning of one who goes on where nobody was: the largest number that a shard names, the same on all, see
    :mod:`downpour_server.policy.stale`."""
    buffers = _of(replies, column, "buffer")
    return Beginning(max((r.clock for r in replies), default=0), max((r.buffers for r in buffers), default=0))


def taken_over(replies: Sequence[HelloReply], column: Column) -> Beginning:
    """The beginning of one who goes on where another has died in the middle of anything.

    It makes anew the first contribution that is missing anywhere; shards that have it do not apply it again.
    """
    trainable, buffers = _of(replies, column, "trainable"), _of(replies, column, "buffer")
    seq = min((r.clock for r in trainable), default=0)
    positions = [(r.position[0], r.position[1]) for r in trainable if r.clock == seq and len(r.position) == 2]
    ended = max((r.ended for r in replies if r.ended), default=())
    if len(ended) == 2 and ended[0] == 0:  # whatever its last samples were, it has no more of that pass
        positions.append((ended[1] + 1, 0))
    return Beginning(seq, min((r.buffers for r in buffers), default=0), max(positions, default=None), ended)


def together(ranks: Sequence[Beginning]) -> Beginning:
    """The beginning that the ranks of a replica have in common: the first contribution that one of them lacks, and the
    data that this one knows of. The rest is each rank's own: here the first's."""
    seq = min(begins.seq for begins in ranks)
    known = [b.position for b in ranks if b.seq == seq and b.position is not None]
    return replace(ranks[0], seq=seq, position=max(known, default=None))


def _of(replies: Sequence[HelloReply], column: Column, kind: str) -> list[HelloReply]:
    """Those of shards that hold chunks of this kind; what the others say of them means nothing."""
    holders = {chunk.shard for chunk in column.chunks if chunk.kind == kind}
    return [r for r in replies if r.shard in holders]
