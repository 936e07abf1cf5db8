"""Which chunks' payloads have left ahead of their push-pull, and whether they are still what is meant."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from downpour.client.core import Ticket
from downpour_common import messages as m


@dataclass(slots=True)
class Outcome:
    """Of the payloads that left ahead: how many were pushed or replaced, and how many of these were not used."""

    settled: int = 0
    wasted: int = 0


class Ahead:
    """The newest payload of each chunk that is at its shard, or on its way."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self._stages: dict[int, tuple[int, Ticket]] = {}

    def note(self, chunk: int, stage: int, answer: Ticket) -> None:
        """The payload of ``chunk`` has left with request ``stage``."""
        self._stages[chunk] = (stage, answer)

    def holds(self, chunk: int) -> bool:
        """Whether a payload of ``chunk`` has left."""
        return chunk in self._stages

    def take(self, chunk: int, digest: bytes) -> int:
        """The request that brought what has this digest now, as far as is known; -1: none has. Forgets it."""
        stage, answer = self._stages.pop(chunk)
        self.outcome.settled += 1
        if answer.settled():
            held = None if answer.error is not None else answer.result()
            if not isinstance(held, m.Staged) or digest not in (b"", held.digest):
                self.outcome.wasted += 1
                return -1
        return stage

    def new_outcome(self) -> Outcome:
        """What has been counted; counts anew."""
        outcome, self.outcome = self.outcome, Outcome()
        return outcome

    def refused(self) -> None:
        """What :meth:`take` gave was not what the shard holds."""
        self.outcome.wasted += 1

    def keep(self, chunks: Container[int]) -> None:
        """Forget all but these: their payload is not what is meant any more."""
        for chunk in [c for c in self._stages if c not in chunks]:
            del self._stages[chunk]
            self.outcome.settled += 1
            self.outcome.wasted += 1
