"""Which workers belong to the job, and which of them a shard still waits for. One object per shard, shared by the
policies of its chunks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from downpour_common.messages import Refusal


@dataclass(frozen=True, slots=True)
class Change:
    """What a new list of members changes. A slot whose worker was replaced is in ``joined`` and in ``over``.

    ``taken_over``: slots in which another process goes on where the one before was; they are in none of the others.
    """

    joined: frozenset[int]
    over: frozenset[int]
    """slots whose worker of before is no longer one"""
    lost: frozenset[int]
    """those of ``over`` whose worker never said that it leaves"""
    taken_over: frozenset[int] = frozenset()


class Awaited(Protocol):
    """What a policy asks of the members."""

    @property
    def first_seq(self) -> int:
        """Number of the first contribution of all who are there at the job's start."""

    def awaited(self) -> list[int]:
        """Slots that owe the open round a contribution, ascending. Not to be changed by the caller."""


class Members:
    """Slots, each with the epoch of the worker that is in it. A slot is *awaited* until it ended its epoch or left.

    At first they are 0 to ``workers - 1``, with whatever epoch speaks; from the first :meth:`replace` on they are
    what that says, and ``version`` is above 0. ``first_seq`` is the number of the first contribution of all who are
    there at the job's start. ``take_over``: a newer epoch of a slot goes on where the older one was, if that has not
    left.
    """

    def __init__(self, workers: int, first_seq: int = 0, take_over: bool = False) -> None:
        self.first_seq = first_seq
        self._take_over = take_over
        self.version = 0
        self._epochs: dict[int, int | None] = dict.fromkeys(range(workers))
        self._over: dict[int, int] = {}
        """slot → newest epoch of it that was a member's and is not any more"""
        self._ended: set[int] = set()
        self._left: set[int] = set()
        self._awaited: list[int] = sorted(self._epochs)

    @property
    def ended(self) -> frozenset[int]:
        """Slots that have no more in this epoch."""
        return frozenset(self._ended)

    def awaited(self) -> list[int]:
        """Slots that owe the open round a contribution, ascending. Not to be changed by the caller."""
        return self._awaited

    @property
    def slots(self) -> Collection[int]:
        """All of them."""
        return self._epochs.keys()

    @property
    def sole(self) -> tuple[int, int] | None:
        """Slot and epoch of the only member, if there is exactly one, it has spoken, and it has not left."""
        if len(self._epochs) != 1:
            return None
        [(slot, epoch)] = self._epochs.items()
        return None if epoch is None or slot in self._left else (slot, epoch)

    def knows(self, slot: int, epoch: int) -> bool:
        """Whether a message of this worker would tell nothing new about the members."""
        return slot not in self._epochs or self._epochs[slot] == epoch or self.version > 0

    def objection(self, slot: int, epoch: int) -> tuple[Refusal, str] | None:
        """Why a message of this worker is not for this shard; None when it is."""
        name = f"worker/{slot}"
        if slot not in self._epochs:
            if epoch <= self._over.get(slot, -1):
                return Refusal.STALE_EPOCH, f"{name} of epoch {epoch} is no longer a member of the job"
            return Refusal.MALFORMED, f"slot {slot} is not a member of the job"
        known = self._epochs[slot]
        if known is None or (epoch > known and not self.version):
            self._epochs[slot] = epoch
        elif epoch < known:
            return Refusal.STALE_EPOCH, f"{name} has been replaced: its epoch {epoch} is over, {known} is in force"
        elif epoch > known:
            return Refusal.MALFORMED, f"{name} of epoch {epoch} is not a member of the job yet"
        return None

    def end_epoch(self, slot: int) -> None:
        """``slot`` has no more in this epoch."""
        self._ended.add(slot)
        self._look()

    def leave(self, slot: int) -> None:
        """``slot`` has no more, ever."""
        self._left.add(slot)
        self._ended.discard(slot)
        self._look()

    def replace(self, version: int, epochs: Mapping[int, int], takes_over: Collection[int] = ()) -> Change | None:
        """From now on the members are these; None, and nothing changes, when ``version`` is not news.

        A slot that is new, or has a newer epoch than before, joins, or is taken over, one that has left only if
        ``takes_over`` has it; a slot that is not named is over.
        """
        if version <= self.version:
            return None
        before = self._epochs
        joined = {s for s, epoch in epochs.items() if s not in before or _newer(epoch, before[s])}
        taken_over = {s for s in joined & before.keys() if self._take_over and (s not in self._left or s in takes_over)}
        joined -= taken_over
        over = {s for s in before if s not in epochs or s in joined}
        lost = over - self._left
        for slot in over:  # one that is taken over is told that it has been replaced
            self._over[slot] = max(self._over.get(slot, 0), before[slot] or 0)
        self._ended -= joined | over
        self._left -= joined | over
        self._epochs = dict(epochs)
        self.version = version
        self._look()
        return Change(frozenset(joined), frozenset(over), frozenset(lost), frozenset(taken_over))

    def turn_over(self) -> bool:
        """Begin the next epoch if nobody has more in this one; asked once the gates have done their last rounds."""
        if self._ended and not self._awaited:
            self._ended.clear()
            self._look()
            return True
        return False

    def _look(self) -> None:
        self._awaited = sorted(self._epochs.keys() - self._ended - self._left)


def _newer(epoch: int, known: int | None) -> bool:
    """One that has not spoken yet has nothing that a newer epoch would have to be kept apart from."""
    return known is not None and epoch > known
