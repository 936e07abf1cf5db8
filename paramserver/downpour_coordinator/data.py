"""Who trains which samples: leases in the asynchronous modes, passes split by rounds in the synchronous ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m
from downpour_coordinator.leases import PassLedger, Span, merge

PASSES_KEPT = 3
"""Newest passes per loader whose ledgers and splits are remembered."""

Key = tuple[int, int]
"""(loader, epoch) of a pass."""


@dataclass(slots=True)
class DataState:
    """All passes of one job. ``first_epoch`` and ``done``: where a resumed job goes on in its first loader."""

    first_epoch: int = 0
    done: tuple[Span, ...] = ()
    ledgers: dict[Key, PassLedger] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)
    """slot → its newest pass over the first loader"""
    splits: dict[Key, list[int]] = field(default_factory=dict)
    """sync: the slots among which a pass is split, fixed by the first worker that begins it"""

    given_back: dict[Key, list[Span]] = field(default_factory=dict)
    """what workers held when they left, by pass"""

    def take(self, take: m.TakeLease, workers: int) -> Span | str:
        """A worker reports what it has done and, unless ``unit`` is 0, gets more; or the reason why it cannot."""
        key = (take.loader, take.epoch)
        for other, ledger in self.ledgers.items():
            if other[0] == take.loader and other[1] < take.epoch:
                ledger.release(take.slot)  # the script left that pass early
        found = self.ledgers.get(key)
        if take.loader == 0:
            self.newest[take.slot] = max(take.epoch, self.newest.get(take.slot, 0))
        if found is None:
            if not take.unit or self._forgotten(*key):
                return (take.total, take.total)
            resumed = list(self.done) if key == (0, self.first_epoch) else []
            found = self.ledgers[key] = PassLedger.begin(take.total, take.order, resumed)
            self._forget_before(take.loader, take.epoch)
        for start, stop in zip(take.done[::2], take.done[1::2], strict=False):
            found.finish(take.slot, (start, stop))
        if not take.unit:
            found.release(take.slot)  # it will not go on with what it holds
            return (found.total, found.total)
        if (found.total, found.order) != (take.total, take.order):
            return (
                f"worker/{take.slot} has {take.total} samples in pass {take.epoch} of loader {take.loader} "
                f"in the order {take.order}, the others {found.total} in the order {found.order}; "
                "every worker must see the same dataset in the same order (seed what is random in it)"
            )
        return found.grant(take.slot, take.unit, max(1, workers))

    def release(self, slot: int) -> None:
        """``slot`` has left: what it holds and has not finished is free again."""
        for key, ledger in self.ledgers.items():
            if held := ledger.leased.get(slot):
                self.given_back.setdefault(key, []).extend(held)
            ledger.release(slot)

    def position(self, live: Iterable[int], finished_epochs: list[int]) -> tuple[int, list[Span]]:
        """The pass over the first loader that the last of the ``live`` slots is in, and what of it is done."""
        if not self.newest:
            epoch = min(finished_epochs, default=self.first_epoch)
            return epoch, list(self.done) if epoch == self.first_epoch else []
        alive = set(live)
        epochs = [epoch for slot, epoch in self.newest.items() if slot in alive]
        epoch = min(epochs) if epochs else max(self.newest.values())
        while (ledger := self.ledgers.get((0, epoch))) is None or ledger.closed:
            if ledger is None and not self._forgotten(0, epoch):
                return epoch, []
            epoch += 1
        return epoch, ledger.done

    def split(self, begin: m.BeginPass, members: list[int]) -> tuple[int, int]:
        """(workers, index) of the asker's part of a pass; fixed for all by the first that asks."""
        slots = self.splits.setdefault((begin.loader, begin.epoch), list(members))
        if begin.slot not in slots:
            slots = members
        for key in [k for k in self.splits if k[0] == begin.loader and k[1] < begin.epoch - PASSES_KEPT]:
            del self.splits[key]
        return len(slots), slots.index(begin.slot) if begin.slot in slots else 0

    def newest_split(self) -> int | None:
        """sync: the newest pass that has begun over the first loader."""
        return max((epoch for loader, epoch in self.splits if loader == 0), default=None)

    def epochs_of_others(self) -> list[int]:
        """The newest pass that anybody has begun over each loader but the first."""
        newest: dict[int, int] = {}
        for loader, epoch in (*self.ledgers, *self.splits):
            newest[loader] = max(epoch, newest.get(loader, 0))
        return [newest.get(loader, 0) for loader in range(1, max(newest, default=0) + 1)]

    def returned(self) -> int:
        """Samples that workers gave back when they left, and that nobody has taken since."""
        return sum(
            max(0, min(stop, b) - max(start, a))
            for key, spans in self.given_back.items()
            if (ledger := self.ledgers.get(key)) is not None
            for start, stop in merge(spans)
            for a, b in ledger.free
        )

    def _forgotten(self, loader: int, epoch: int) -> bool:
        """Whether a pass without a ledger was completed so long ago that others are far ahead."""
        return any(k[0] == loader and epoch < k[1] - PASSES_KEPT for k in self.ledgers)

    def _forget_before(self, loader: int, epoch: int) -> None:
        for key in [k for k in self.ledgers if k[0] == loader and k[1] < epoch - PASSES_KEPT]:
            if self.ledgers[key].closed:
                del self.ledgers[key]

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {
            "first_epoch": self.first_epoch,
            "done": list(self.done),
            "ledgers": [[*key, ledger.document()] for key, ledger in self.ledgers.items()],
            "newest": list(self.newest.items()),
            "splits": [[*key, slots] for key, slots in self.splits.items()],
            "given_back": [[*key, spans] for key, spans in self.given_back.items()],
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> DataState:
        """The inverse of :meth:`document`."""
        return cls(
            document["first_epoch"],
            tuple((a, b) for a, b in document["done"]),
            {(loader, epoch): PassLedger.from_document(d) for loader, epoch, d in document["ledgers"]},
            dict(document["newest"]),
            {(loader, epoch): slots for loader, epoch, slots in document["splits"]},
            {(loader, epoch): [(a, b) for a, b in spans] for loader, epoch, spans in document["given_back"]},
        )
