"""The DataLoader that ``prepare`` gives back: the user's own, over this worker's part of the samples."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from downpour.data import order as orders
from downpour.data.record import Part, PassRecord
from downpour.data.rounds import Round, RoundSplit
from downpour_common.errors import ModelError, PeerError
from downpour_common.messages import Lease


class Host(Protocol):
    """What a prepared loader needs of its worker. ``leaving``: it has been asked to leave."""

    seed: int
    synchronous: bool

    @property
    def leaving(self) -> bool:
        """Whether this worker is to leave the job."""

    @property
    def share(self) -> tuple[int, int]:
        """(workers, index): how many there are, as far as is known, and which of them this one is."""

    def leave_point(self) -> None:
        """Ends the script if this worker is to leave."""

    def take_lease(
        self, loader: int, epoch: int, total: int, unit: int, digest: str, done: list[tuple[int, int]]
    ) -> Lease:
        """More positions of a pass, and a report of what is done."""

    def report_done(self, loader: int, epoch: int, done: list[tuple[int, int]]) -> None:
        """What is done of a pass that is over; the rest of this worker's leases goes back. In any thread."""

    def pass_begins(self, loader: int, epoch: int) -> tuple[int, int]:
        """A pass over a loader begins; returns (workers, index) for all of it."""

    def batch_wanted(self, loader: int) -> None:
        """The next batch is about to be fetched."""

    def batch_taken(self, loader: int, samples: int, position: tuple[int, int] | None) -> None:
        """A batch is given to the script; ``position`` is the data position once it is used, where known."""

    def pass_ends(self, loader: int, epoch: int, batches: int) -> None:
        """The loader has no more for this worker in this pass."""


class _Units(Sampler[Any]):
    """Yields what the inner loader asks for next, and notes each batch's place in ``parts``."""

    def __init__(self, loader: PreparedLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        for part, unit in self._loader.next_units():
            self._loader.parts.append(part)
            yield unit

    def __len__(self) -> int:
        return len(self._loader)


class _EveryNth(IterableDataset[Any]):
    """The samples of an iterable dataset whose number is ``index`` modulo ``workers``; ``share`` is both."""

    def __init__(self, dataset: IterableDataset[Any], share: tuple[int, int]) -> None:
        self._dataset = dataset
        self.share = share

    def __iter__(self) -> Iterator[Any]:
        workers, index = self.share
        for number, sample in enumerate(self._dataset):
            if number % workers == index:
                yield sample


class PreparedLoader(DataLoader[Any]):
    """A DataLoader over this worker's share; each ``iter()`` is one pass.

    Map-style datasets: in the synchronous modes by rounds, from (seed, epoch, round) alone; in the others by leases,
    so that a faster worker takes more. ``len()`` is exact for rounds and a fair share for leases, as long as no worker
    joins or leaves. Iterable datasets: every n-th sample.
    """

    def __init__(self, original: DataLoader[Any], index: int, host: Host, start: tuple[int, int]) -> None:
        self._original = original
        self._host = host
        self._index = index
        self._epoch, self._start_offset = start
        self._drop_last = bool(getattr(original, "drop_last", False))
        self._iterable = isinstance(original.dataset, IterableDataset)
        self.parts: deque[Part] = deque()
        self._record: PassRecord | None = None  # of the open pass
        self._share = host.share
        self._torn = 0
        self._leased = False
        self.taken: tuple[int, tuple[int, int] | None] = (0, None)
        """samples of the newest batch, and the data position once it is used"""
        source = None if self._iterable else orders.units(original)
        self._by_sample = self._iterable or source is original.sampler
        self._unit = (original.batch_size or 1) if self._by_sample else 1
        super().__init__(**self._arguments())
        object.__setattr__(self, "batch_size", original.batch_size)
        object.__setattr__(self, "drop_last", self._drop_last)

    def _arguments(self) -> dict[str, Any]:
        o = self._original
        arguments: dict[str, Any] = {
            "dataset": o.dataset,
            "num_workers": o.num_workers,
            "collate_fn": o.collate_fn,
            "pin_memory": o.pin_memory,
            "timeout": o.timeout,
            "worker_init_fn": o.worker_init_fn,
            "multiprocessing_context": o.multiprocessing_context,
            "generator": o.generator,
            "prefetch_factor": o.prefetch_factor,
            "persistent_workers": o.persistent_workers,
        }
        if self._iterable:
            assert isinstance(o.dataset, IterableDataset)
            arguments["dataset"] = _EveryNth(o.dataset, self._share)
            arguments.update(batch_size=o.batch_size, drop_last=o.drop_last)
        elif o.batch_sampler is None:
            arguments.update(batch_size=None, sampler=_Units(self))
        else:
            arguments["batch_sampler"] = _Units(self)
        return arguments

    @property
    def epoch(self) -> int:
        """Passes finished so far, those before a resume included."""
        return self._epoch

    def _split(self, share: tuple[int, int], offset: int) -> RoundSplit:
        units = orders.units(self._original)
        if not hasattr(units, "__len__"):
            raise ModelError(f"{type(units).__name__} has no length, which mode sync needs for its rounds; add __len__")
        total = len(units)
        return RoundSplit(total, self._unit, *share, self._drop_last and self._by_sample, offset)

    def __len__(self) -> int:
        if self._host.synchronous and not self._iterable:
            return self._split(self._host.share, 0).rounds
        return math.ceil(len(self._original) / self._host.share[0])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._host.leave_point()
        self.parts.clear()
        epoch, batches = self._epoch, 0
        record = self._begin(epoch)
        try:
            fetches = super().__iter__()
            while True:
                self._host.batch_wanted(self._index)
                try:
                    batch = next(fetches)
                except StopIteration:
                    break
                part = self.parts.popleft() if self.parts else None
                self.taken = self._samples(batch, part), self._position(epoch, part)
                self._host.batch_taken(self._index, *self.taken)
                if part is not None:
                    record.take(part)
                yield batch
                batches += 1
                record.next_asked(torch.is_grad_enabled())
            record.end(complete=True)
        finally:  # also for a script that leaves the pass early: the next pass is another one
            self._end(record)
        self._pass_over()
        self._host.pass_ends(self._index, epoch, batches)

    def _pass_over(self) -> None:
        """The pass has no more batches."""

    def _begin(self, epoch: int) -> PassRecord:
        share = self._host.pass_begins(self._index, epoch)
        if self._iterable and share != self._share:
            assert isinstance(self.dataset, _EveryNth)
            self.dataset.share = share
            self._iterator = None  # persistent loader processes have a copy of the dataset
        self._share = share
        self._record = PassRecord()
        return self._record

    def _end(self, record: PassRecord) -> None:
        if self._record is not record:
            return  # settled before
        self._freeze()
        with contextlib.suppress(PeerError):  # at the very end, when the connection is closed
            self._report_done()
        self._record = None
        self._epoch += 1
        self._start_offset = 0

    def _freeze(self) -> None:
        """The open pass is over, complete or not. One who leaves counts what it will not train."""
        assert self._record is not None
        if not self._host.leaving:
            self._record.end(complete=False)
        elif not self._record.complete and (self._record.trained or self._index == 0):  # others were only looked at
            part = self.part(self._share, self._start_offset)  # 0 for leases: what is left of them goes back
            self._torn += max(0, part - self._record.trained)

    def part(self, share: tuple[int, int], offset: int = 0) -> int:
        """Samples of this worker's part of a pass in rounds; 0 where parts are not known before."""
        if self._iterable or not self._host.synchronous:
            return 0
        order = self._order()
        return sum(self._part(r, order).samples for r in self._split(share, offset))

    def settle(self) -> int:
        """This worker leaves the job: report what is done of an open pass.

        Returns samples of its part of passes in rounds that it has not trained and nobody will.
        """
        if self._record is not None:
            self._end(self._record)
        return self._torn

    def stepped(self) -> None:
        """A step was completed with all batches taken so far."""
        if self._record is not None:
            self._record.stepped()

    def _samples(self, batch: Any, part: Part | None) -> int:
        return part.stop - part.start if part is not None and self._by_sample else _batch_size(batch)

    def _position(self, epoch: int, part: Part | None) -> tuple[int, int] | None:
        """Where the training data stands once this batch is used; leases are the coordinator's to know."""
        if part is None or not self._host.synchronous:
            return None
        return (epoch + 1, 0) if part.last else (epoch, part.offset)

    def _order(self) -> Sequence[Any]:
        return orders.pass_order(self._original, self._host.seed, self._index, self._epoch)

    def next_units(self) -> Iterator[tuple[Part, Any]]:
        """This worker's batches of the present pass, with their places."""
        order = self._order()
        places = self._rounds() if self._host.synchronous else self._leases(order)
        for place in places:
            part = self._part(place, order)
            if self._by_sample and self._original.batch_sampler is not None:
                yield part, [int(i) for i in order[part.start : part.stop]]
            else:
                unit = order[part.start]
                yield part, int(unit) if isinstance(unit, np.integer) else unit

    def _part(self, place: Round, order: Sequence[Any]) -> Part:
        samples = place.stop - place.start
        if not self._by_sample:
            samples = sum(_batch_size(order[at]) for at in range(place.start, place.stop))
        return Part(place.start, place.stop, samples, place.offset, place.last)

    def _rounds(self) -> Iterator[Round]:
        return (r for r in self._split(self._share, self._start_offset) if r.start < r.stop)

    def _leases(self, order: Sequence[Any]) -> Iterator[Round]:
        total, unit = len(order), self._unit
        if self._drop_last and self._by_sample:
            total -= total % unit
        digest = orders.digest(order)
        while True:
            done = self._record.report() if self._record is not None else []
            lease = self._host.take_lease(self._index, self._epoch, total, unit, digest, done)
            self._leased = True
            if lease.start >= lease.stop:
                return
            for start in range(lease.start, lease.stop, unit):
                yield Round(start, min(start + unit, lease.stop), 0, False)

    def _report_done(self) -> None:
        """What is done of a pass by leases; the rest of them goes back."""
        if self._leased and self._record is not None:
            self._leased = False
            self._host.report_done(self._index, self._epoch, self._record.report())


def _batch_size(batch: Any) -> int:
    """Samples in a batch of unknown make: the length of the first tensor or sequence in it."""
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, dict):
        return _batch_size(next(iter(batch.values()))) if batch else 1
    if isinstance(batch, (list, tuple)) and batch:
        first = batch[0]
        return _batch_size(first) if isinstance(first, (torch.Tensor, dict, list, tuple)) else len(batch)
    return 1
