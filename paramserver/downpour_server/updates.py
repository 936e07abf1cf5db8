"""A chunk's updates once its gate says that they are due, and the answers that they let go."""

from __future__ import annotations

from collections.abc import Iterable

from downpour_server.captures import Captures
from downpour_server.common import Common
from downpour_server.contribution import Contribution
from downpour_server.effects import Effect
from downpour_server.endings import Endings
from downpour_server.fetches import Fetches
from downpour_server.noise import NoiseMeter
from downpour_server.store import StoredChunk


class Updates:
    """See the module."""

    def __init__(
        self,
        common: Common,
        fetches: Fetches,
        endings: Endings,
        captures: Captures,
        noise: NoiseMeter,
    ) -> None:
        self._chunks = common.chunks
        self._columns = common.columns
        self._fetches = fetches
        self._endings = endings
        self._captures = captures
        self._stats = common.stats
        self._noise = noise
        self.unaligned: set[int] = set()
        """chunks whose next round says which one it is: a worker that was lost may have torn the last one of a pass"""

    def apply(self, stored: StoredChunk, rounds: Iterable[list[Contribution]]) -> None:
        """These are due, in this order."""
        stats = self._stats
        for round_ in rounds:
            if self.unaligned and stored.chunk.index in self.unaligned:
                self.unaligned.remove(stored.chunk.index)
                stored.version = max(stored.version, *(c.seq for c in round_))
            counted = [c for c in round_ if not c.void]
            if stored.trainable:
                for contribution in counted:
                    stats.apply(contribution.slot, max(0, stored.version - contribution.base_version))
                    stats.uncompensated += not stored.compensates(contribution)
                stats.updates += 1
                self._noise.look(stored.chunk.index, stored.version, counted)
            if stored.coding is not None:
                stored.coding.begin(stored.weights)
            stored.apply(counted)
            if stored.coding is not None:
                stored.coding.advance(stored.weights)
            if stored.trainable:
                stats.round = max(stats.round, stored.version)
            self._captures.applied(stored, round_)

    def answer(self, index: int, effects: list[Effect]) -> None:
        """Answer the chunk's fetches that the policy lets go; a snapshot asks their workers first what they owe."""
        if self._captures.open is not None and self._chunks[index].coded_push:
            self._ask_residuals(self._chunks[index], self._captures.open.at_clock, effects)
        self._fetches.answer(index, effects)

    def _ask_residuals(self, stored: StoredChunk, clock: int, effects: list[Effect]) -> None:
        peers = {f.slot: f.peer for f in self._fetches.waiting[stored.chunk.index] if f.seq == clock - 1}
        peers.update({e.slot: e.peer for e in self._endings.waiting if self._columns.owns(e.slot, stored)})
        self._captures.ask(stored, peers, effects)
