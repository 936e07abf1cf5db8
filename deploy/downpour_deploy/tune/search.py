"""Batch sizes, doubled until it is of no use or does not fit; and the knee of what was found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from downpour.tuning import Report
from downpour_common.sizes import format_bytes

KNEE_SHARE = 0.9
"""Of the best throughput: the smallest batch size that reaches it is the knee."""
GAIN = 1.02
"""A batch size is better than another if its throughput is this much higher: steps vary by as much."""
PATIENCE = 2
"""Doublings in a row that bring nothing, after which there are no more."""
SPARE_SHARE = 0.95
"""Of the memory that there is, what may be used where the user has set no limit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size as it was found. Bytes: ``baseline`` before the first step, with model and data; ``peak``: all."""

    batch_size: int
    samples_per_s: float
    step_s: float
    baseline_bytes: int
    peak_bytes: int


def row_of(batch_size: int, report: Report) -> Row:
    """Medians of the timed steps, of which there must be some."""
    step_s = statistics.median(report.step_s)
    samples = statistics.median(report.step_samples)  # more than the batch size where gradients are accumulated
    return Row(batch_size, samples / step_s, step_s, report.baseline_bytes, report.peak_bytes)


class Search:
    """``first`` to ``last`` (0: no end), doubling. ``budget``: bytes that a worker may take; 0: what there is.

    ``share``: workers that are to share a machine's memory, which each knows as a whole.
    """

    def __init__(self, first: int, last: int, budget: int, share: int = 1) -> None:
        self.rows: list[Row] = []
        self.stopped = ""
        """why there is no more"""
        self.own_batch_size = 0
        """what the script asks for; 0: not known yet"""
        self.device = ""
        self._next = first
        self._last = last
        self._budget = budget
        self._share = share
        self._idle = 0

    def next(self) -> int | None:
        """The batch size to try; None: no more."""
        return None if self.stopped else self._next

    def take(self, report: Report) -> None:
        """What the batch size that :meth:`next` gave has cost."""
        size, before = self._next, self.best
        row = row_of(size, report)
        self.device, self.own_batch_size = report.device, report.own_batch_size
        limit = self._budget or int(
            SPARE_SHARE * report.capacity_bytes / (self._share if report.device == "cpu" else 1)
        )
        if limit and row.peak_bytes > limit:
            self.stop(f"{size} took {format_bytes(row.peak_bytes)}, and there are {format_bytes(limit)}")
            return
        grown = 2 * max(0, row.peak_bytes - self.rows[-1].peak_bytes) if self.rows else 0
        self.rows.append(row)
        self._idle = 0 if before is None or row.samples_per_s > GAIN * before.samples_per_s else self._idle + 1
        self._next = 2 * size
        if self._idle >= PATIENCE:
            self.stop(f"{PATIENCE} doublings in a row have brought less than {GAIN - 1:.0%}")
        elif self._last and self._next > self._last:
            self.stop(f"{size} is the last one asked for")
        elif report.samples and self._next > report.samples:
            self.stop(f"the data set has {report.samples} samples")
        elif limit and row.peak_bytes + grown > limit:
            self.stop(
                f"{self._next} would take about {format_bytes(row.peak_bytes + grown)}, and there are "
                f"{format_bytes(limit)}"
            )

    def stop(self, why: str) -> None:
        """No more than what was found so far."""
        self.stopped = why

    @property
    def best(self) -> Row | None:
        """The highest throughput."""
        return max(self.rows, key=lambda row: row.samples_per_s, default=None)

    @property
    def knee(self) -> Row | None:
        """The smallest batch size with :data:`KNEE_SHARE` of the best throughput."""
        return knee(self.rows)


def knee(rows: Sequence[Row]) -> Row | None:
    """See :attr:`Search.knee`; ``rows`` by ascending batch size."""
    best = max((row.samples_per_s for row in rows), default=0.0)
    return next((row for row in rows if row.samples_per_s >= KNEE_SHARE * best), None)
