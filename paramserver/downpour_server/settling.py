"""What a former process of this shard had, and this one has not: contributions that are lost, and counted as such."""

from __future__ import annotations

from downpour_server.common import Common


class Settling:
    """See the module."""

    def __init__(self, common: Common) -> None:
        self._members = common.members
        self._columns = common.columns
        self._stats = common.stats
        self.recovered = False
        """there was a former process"""

    def settle(self, slot: int, worker_epoch: int, done: int, first: int = -1) -> None:
        """A worker has answers to all contributions from ``first`` (-1: the job's first) on and below ``done``: what of
        them is not here was lost with a former process of this shard."""
        if not self.recovered or done < 0:
            return
        for stored in self._columns.trainable(slot):
            window = stored.restored_window(slot, worker_epoch, self._members.first_seq if first < 0 else first)
            if window is not None:
                window.settle(first)  # below it there never was anything
                self._stats.lose(slot, stored.chunk.index, window.settle(done))

    def nothing_lost(self, slot: int, worker_epoch: int) -> None:
        """The worker begins here and now."""
        if self.recovered:
            for stored in self._columns.trainable(slot):
                stored.window(slot, worker_epoch, self._members.first_seq).unsettled = False
