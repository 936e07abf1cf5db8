"""A :class:`Training` as plain values, for the journal, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from downpour_common import messages as m
from downpour_common.layout import ModelSpec
from downpour_coordinator.agreements import Agreements
from downpour_coordinator.barriers import Barriers
from downpour_coordinator.data import DataState
from downpour_coordinator.participants import ShardEntry, Worker, progress_from
from downpour_coordinator.replicas import Backup

if TYPE_CHECKING:
    from downpour_coordinator.training import Training


def document_of(training: Training) -> dict[str, Any]:
    """All that must survive the process, but for the model, as plain values. A snapshot under way does not."""
    return {
        "facts": training.facts.document(),
        "workers": [w.document() for w in training.workers.values()],
        "shards": [s.document() for s in training.shards.values()],
        "backups": [[index, b.document()] for index, b in training.backups.items()],
        "without_backups": training.without_backups,
        "failures": [asdict(f) for f in training.failures],
        "setup_error": training.setup_error,
        "latest": training.latest,
        "torn": training.torn,
        "done_because": training.done_because,
        "begun": training.begun,
        "data": training._data.document(),
        "barriers": training._barriers.document(),
        "agreed": training._agreements.document(),
        "minimiser": training._minimiser.document(),
        "passes": [asdict(begin) for _, begin in training._passes.values()],
        "version": training._version,
        "members": list(training._members.items()),
        "told": training._told,
        "margin": training._snapshots.margin,
        "clock": training._clock,
        "former": [asdict(p) for p in training.former],
        "left": training._left,
    }


def restore(training: Training, document: dict[str, Any], model: ModelSpec | None) -> None:
    """The inverse of :func:`document_of`, into a new one. Workers that waited for a welcome will ask again."""
    training.model = model
    training.workers = {d["slot"]: Worker.from_document(d) for d in document["workers"]}
    training.shards = {d["index"]: ShardEntry.from_document(d) for d in document["shards"]}
    training.backups = {index: Backup(**d) for index, d in document["backups"]}
    training.without_backups = document["without_backups"]
    training.failures = [m.ReportFailure(**f) for f in document["failures"]]
    training.setup_error, training.latest = document["setup_error"], document["latest"]
    training.torn, training.begun = document["torn"], document["begun"]
    training.done_because = document.get("done_because", "")
    training._data = DataState.from_document(document["data"])
    training._barriers = Barriers.from_document(document["barriers"])
    training._agreements = Agreements.from_document(document.get("agreed", []))
    training._minimiser.restore(document.get("minimiser", {}))
    training._passes = {b["slot"]: (b"", m.BeginPass(**b)) for b in document["passes"]}
    training._version, training._members = document["version"], dict(document["members"])
    training._told = tuple(document["told"])
    training._snapshots.margin, training._clock = document["margin"], document["clock"]
    training.former = [progress_from(p) for p in document["former"]]
    training._left = [(slot, epoch, first, done) for slot, epoch, first, done in document["left"]]
