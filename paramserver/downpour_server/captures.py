"""The snapshot that is being collected, if there is one: what it sees of the training, and when it is complete."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from downpour_common import messages as m
from downpour_common.transport import Peer
from downpour_server import residuals
from downpour_server.common import Common
from downpour_server.contribution import Contribution
from downpour_server.effects import Effect
from downpour_server.snapshot import Capture
from downpour_server.store import StoredChunk


class Captures:
    """See the module."""

    def __init__(self, common: Common, job: str, shard: int) -> None:
        self._job = job
        self._shard = shard
        self._chunks = common.chunks
        self._gates = common.gates
        self._numbered = common.numbered
        self._stats = common.stats
        self.open: Capture | None = None
        self._position: tuple[int, ...] = ()
        """of the training data, after all that is in the weights"""

    def begin(self, snapshot: int, folder: str, at_clock: int, effects: list[Effect]) -> None:
        """See :class:`Capture`."""
        if self.open is not None:
            effects.append(self.open.failed("another snapshot began before it was complete"))
        capture = Capture(snapshot, folder, at_clock, self._shard, self._chunks, self._waiting)
        if not all(stored.initialised for stored in self._chunks.values()):
            effects.append(capture.failed("the first weights are not there yet"))
            return
        self.open = capture
        for stored in self._chunks.values():
            capture.look(stored, self._position, begins=self._numbered)
        self.finish(effects)

    def applied(self, stored: StoredChunk, round_: list[Contribution]) -> None:
        """These are in the chunk's weights, or were left out of them."""
        self._position = max(self._position, *(c.position for c in round_))
        if self.open is not None:
            self.open.look(stored, self._position)

    def ask(self, stored: StoredChunk, peers: Mapping[int, Peer], effects: list[Effect]) -> None:
        """These workers, by slot, may owe something; see :mod:`downpour_server.residuals`."""
        if self.open is not None:
            effects += residuals.ask(self._job, stored, self.open, peers)

    def keep_residual(self, message: m.Residual, stored: StoredChunk) -> None:
        """What a worker owes ``stored``."""
        residuals.keep(message, stored, self.open)

    def release(self, slot: int) -> None:
        """Nothing more is heard of the worker in ``slot``."""
        if self.open is not None:
            self.open.release(slot)

    def finish(self, effects: list[Effect]) -> None:
        """Have the snapshot written if it is complete, or cannot be."""
        if self.open is not None and (written := self.open.effect()) is not None:
            self.open = None
            if not written.error:
                written.document.update(self._stats.losses())
            effects.append(written)

    def _waiting(self, stored: StoredChunk) -> Collection[tuple[int, int]]:
        """Slot and number of what has come to the chunk and is not in its weights yet."""
        return self._gates[stored.chunk.index].waiting()
