"""The DataLoader that ``prepare`` gives back: the user's own, over this worker's part of the samples."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from downpour.data import order as orders
from downpour.data.rounds import RoundSplit
from downpour_common.errors import ModelError, PeerError
from downpour_common.messages import Lease


@dataclass(frozen=True, slots=True)
class Part:
    """One batch's place in its pass: positions ``start:stop``; ``offset`` and ``last`` as in ``rounds.Round``."""

    start: int
    stop: int
    offset: int = 0
    last: bool = False


class Host(Protocol):
    """What a prepared loader needs of its worker."""

    slot: int
    workers: int
    seed: int
    synchronous: bool

    def take_lease(
        self, loader: int, epoch: int, total: int, unit: int, digest: str, done: list[tuple[int, int]]
    ) -> Lease:
        """More positions of a pass (``unit`` 0: only report what is done)."""

    def pass_begins(self, loader: int) -> None:
        """A pass over a loader begins."""

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
    """The samples of an iterable dataset whose number is ``slot`` modulo ``workers``."""

    def __init__(self, dataset: IterableDataset[Any], slot: int, workers: int) -> None:
        self._dataset, self._slot, self._workers = dataset, slot, workers

    def __iter__(self) -> Iterator[Any]:
        for number, sample in enumerate(self._dataset):
            if number % self._workers == self._slot:
                yield sample


class PreparedLoader(DataLoader[Any]):
    """A DataLoader over this worker's share; each ``iter()`` is one pass.

    Map-style datasets: in the synchronous modes by rounds, from (seed, epoch, round) alone; in the others by leases,
    so that a faster worker takes more. ``len()`` is exact for rounds and a fair share for leases. Iterable datasets:
    every n-th sample.
    """

    def __init__(self, original: DataLoader[Any], index: int, host: Host, start: tuple[int, int]) -> None:
        self._original = original
        self._host = host
        self._index = index
        self._epoch, self._start_offset = start
        self._drop_last = bool(getattr(original, "drop_last", False))
        self._iterable = isinstance(original.dataset, IterableDataset)
        self.parts: deque[Part] = deque()
        self._finished: list[tuple[int, int]] = []
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
            arguments["dataset"] = _EveryNth(o.dataset, self._host.slot, self._host.workers)
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

    def _split(self, offset: int) -> RoundSplit:
        host = self._host
        units = orders.units(self._original)
        if not hasattr(units, "__len__"):
            raise ModelError(f"{type(units).__name__} has no length, which mode sync needs for its rounds; add __len__")
        total = len(units)
        return RoundSplit(total, self._unit, host.workers, host.slot, self._drop_last and self._by_sample, offset)

    def __len__(self) -> int:
        if self._host.synchronous and not self._iterable:
            return self._split(0).rounds
        return math.ceil(len(self._original) / self._host.workers)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.parts.clear()
        self._host.pass_begins(self._index)
        epoch, batches = self._epoch, 0
        try:
            for batch in super().__iter__():
                part = self.parts.popleft() if self.parts else None
                self._host.batch_taken(self._index, self._samples(batch, part), self._position(epoch, part))
                yield batch
                batches += 1
                if part is not None:
                    self._finished.append((part.start, part.stop))
        finally:  # also for a script that leaves the pass early: the next pass is another one
            if not self._iterable and not self._host.synchronous:
                with contextlib.suppress(PeerError):  # at the very end, when the connection is closed
                    self._report_done()
            self._epoch = epoch + 1
            self._start_offset = 0
        self._host.pass_ends(self._index, epoch, batches)

    def _samples(self, batch: Any, part: Part | None) -> int:
        return part.stop - part.start if part is not None and self._by_sample else _batch_size(batch)

    def _position(self, epoch: int, part: Part | None) -> tuple[int, int] | None:
        """Where the training data stands once this batch is used; leases are the coordinator's to know."""
        if part is None or not self._host.synchronous:
            return None
        return (epoch + 1, 0) if part.last else (epoch, part.offset)

    def next_units(self) -> Iterator[tuple[Part, Any]]:
        """This worker's batches of the present pass, with their places."""
        order = orders.pass_order(self._original, self._host.seed, self._index, self._epoch)
        places = self._rounds() if self._host.synchronous else self._leases(order)
        for part in places:
            if self._by_sample and self._original.batch_sampler is not None:
                yield part, [int(i) for i in order[part.start : part.stop]]
            else:
                unit = order[part.start]
                yield part, int(unit) if isinstance(unit, np.integer) else unit

    def _rounds(self) -> Iterator[Part]:
        for r in self._split(self._start_offset):
            if r.start < r.stop:
                yield Part(r.start, r.stop, r.offset, r.last)

    def _leases(self, order: Any) -> Iterator[Part]:
        total, unit = len(order), self._unit
        if self._drop_last and self._by_sample:
            total -= total % unit
        digest = orders.digest(order)
        while True:
            lease = self._host.take_lease(self._index, self._epoch, total, unit, digest, self._take_finished())
            if lease.start >= lease.stop:
                return
            for start in range(lease.start, lease.stop, unit):
                yield Part(start, min(start + unit, lease.stop))

    def _report_done(self) -> None:
        done = self._take_finished()
        if done:
            self._host.take_lease(self._index, self._epoch, 0, 0, "", done)

    def _take_finished(self) -> list[tuple[int, int]]:
        done, self._finished = self._finished, []
        return done


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
