"""Loaders of a replica that is a group: the lead takes samples as any worker does, the others get what it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from downpour.data.loader import Host, PreparedLoader
from downpour.parallel.relay import Relay, Word


class GroupHost(Host, Protocol):
    """What these loaders need of their worker in addition."""

    def word(self) -> Word:
        """On the lead: what the others are to know now, beside the data."""

    def told(self, word: Word) -> None:
        """On all ranks: the lead has said this. Ends the script if the replica is to leave."""

    def batch_given(self, loader: int) -> None:
        """All ranks have the batch, and draw the same from now on."""


class _RelayedLoader(PreparedLoader):
    def __init__(
        self, original: DataLoader[Any], index: int, host: GroupHost, start: tuple[int, int], relay: Relay
    ) -> None:
        self._group_host = host
        self._relay = relay
        super().__init__(original, index, host, start)


class LeadLoader(_RelayedLoader):
    """The lead's: what it yields goes to the other ranks first."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            word = self._group_host.word()
            if not word.leave:
                samples, position = self.taken
                word = Word(samples, position or (), word.stop)
            self._relay.give(word, None if word.leave else batch)
            self._group_host.told(word)
            self._group_host.batch_given(self._index)
            yield batch

    def _pass_over(self) -> None:
        word = self._group_host.word()
        self._relay.give(Word(stop=word.stop, leave=word.leave, over=True))
        self._group_host.told(word)


class FollowingLoader(_RelayedLoader):
    """Another rank's: it never looks at the dataset."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        host, epoch, batches = self._group_host, self._epoch, 0
        host.pass_begins(self._index, epoch)
        try:
            while True:
                word, batch = self._relay.take()
                host.told(word)
                if word.over:
                    break
                position = (word.position[0], word.position[1]) if word.position else None
                host.batch_taken(self._index, word.samples, position)
                host.batch_given(self._index)
                yield batch
                batches += 1
        finally:  # also for a script that leaves the pass early, as all ranks do
            self._epoch += 1
        host.pass_ends(self._index, epoch, batches)
