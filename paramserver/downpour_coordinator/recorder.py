"""What a job's measures are over time: a row of ``metrics.jsonl`` now and then. A state machine: times in, rows out."""

from __future__ import annotations

from collections.abc import Iterable

from downpour_common.config import JobSpec
from downpour_coordinator.effects import LogRow
from downpour_coordinator.measures import measure, samples_by_slot
from downpour_coordinator.target import TargetWatch
from downpour_coordinator.training import Training

EVERY_S = 10.0


class Recorder:
    """Makes a row every :data:`EVERY_S` while a job trains, whose throughputs are those since the row before;
    everything else is of the whole time, as all is in the one when it has trained. Restarted coordinators begin anew.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.target = TargetWatch(spec.target)
        self._spec = spec
        self._training: Training | None = None
        """whose samples are counted"""
        self._began_s = self._since_s = 0.0
        self._samples: dict[int, int] = {}
        self._closed = False

    def change(self, spec: JobSpec) -> None:
        """The job goes on with this description."""
        if spec.target != self._spec.target:
            self.target = TargetWatch(spec.target)
        self._spec = spec

    def row(self, training: Training, train_s: float, over: bool) -> list[LogRow]:
        """The row that is due, ``train_s`` after the first step; ``over``: the workers have come to their end."""
        closed, self._closed = self._closed, over
        if not training.begun:
            return []
        if training is not self._training:
            if self._training is not None:  # it has begun again, and counts from there
                self._began_s = self._since_s = train_s
                self._samples = samples_by_slot(training)
            self._training = training
        if (closed and over) or (train_s - self._since_s < EVERY_S and not over):
            return []
        now = samples_by_slot(training)
        if over:
            measures = measure(training, self._spec, train_s - self._began_s)
        else:
            measures = measure(training, self._spec, train_s, self._samples, self._since_s)
        self._since_s, self._samples = train_s, now
        row = {
            "measures": measures.document(),
            "clock": training.clock(),
            "steps": training.clock() - training.facts.clock,
            "samples": sum(now.values()),
            "train_s": round(train_s, 3),
        }
        return [LogRow(row), *(self._reached() if over and self.target.trained() else ())]

    def logged(self, rows: Iterable[LogRow], training: Training, train_s: float) -> list[LogRow]:
        """Workers have logged these rows; a row more if the target is reached by one."""
        found: list[LogRow] = []
        if self.target.target is None:
            return found
        for each in rows:
            clock, samples = int(each.row["clock"]), sum(samples_by_slot(training).values())
            if self.target.logged(each.row, len(training.live()), train_s, clock, samples):
                found += self._reached()
        return found

    def _reached(self) -> list[LogRow]:
        return [LogRow({"reached": str(self.target.target), **(self.target.reached or {})})]
