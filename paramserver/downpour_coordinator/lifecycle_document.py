"""A :class:`Lifecycle` as plain values, for the journal, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from downpour_common.layout import ModelSpec
from downpour_coordinator.changes import Changes
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure
from downpour_coordinator.roster import Roster
from downpour_coordinator.standby import Standby
from downpour_coordinator.training import Training

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle


def document_of(life: Lifecycle) -> dict[str, Any]:
    """All that must survive the process, but for the model, as plain values."""
    return {
        "spec": life.spec.model_dump(mode="json"),
        "base": life.checkpoints.base,
        "phase": life.phase.value,
        "processes": life.roster.document(),
        "failure": life.failure.document() if life.failure else None,
        "last_failure": life.last_failure.document() if life.last_failure else None,
        "restarts": life.restarts,
        "interrupted": life.interrupted,
        "warnings": life.warnings,
        "model": life.model,
        "wanted": life.wanted,
        "fewest": life.fewest,
        "keep": life._keep,
        "kept": life._kept,
        "ended_well": life._ended_well,
        "snapshots": life.checkpoints.number,
        "times": [life.begun_s, life.first_step_s, life.trained_s],
        "checkpoints": [life._floor, life._newest],
        "begun_again": life._begun_again,
        "non_finite": list(life._non_finite.items()),
        "changes": life.changes.document(),
        "target": life.recorder.target.document(),
        "origin": life.origin.document(),
        "training": life.training.document(),
    }


def restore(life: Lifecycle, document: dict[str, Any], model: ModelSpec | None, now_s: float) -> None:
    """The inverse of :func:`document_of`, into a new one; every wait begins anew, snapshots and exports under way are
    repeated."""
    life.training = Training.from_document(document["training"], model, life.checkpoints.folder)
    life._floor, life._newest = document["checkpoints"]
    life._begun_again, life._non_finite = document["begun_again"], dict(document["non_finite"])
    life.recorder.target.restore(document.get("target", {}))
    if "changes" in document:
        life.changes = Changes.from_document(document["changes"])
    life._now_s = now_s
    life.roster = Roster.from_document(document["processes"], now_s, life.spec.ranks)
    life.failure = Failure(**document["failure"]) if document["failure"] else None
    life.last_failure = Failure(**document["last_failure"]) if document["last_failure"] else None
    life.restarts, life.interrupted = document["restarts"], document["interrupted"]
    life.warnings, life.model = document["warnings"], document["model"]
    life.standby = Standby(life.roster, life._signs, life.warnings)
    life.wanted, life.fewest = document["wanted"], document["fewest"]
    life._keep, life._kept = document["keep"], document["kept"]
    life._ended_well = document["ended_well"]
    life._enter(Phase(document["phase"]), now_s)
    life.checkpoints.wait_from(now_s)
    life.begun_s, life.first_step_s, life.trained_s = document["times"]
    if life.phase is Phase.EXPORTING:
        life._enter(Phase.SAVING, now_s)
    if life.phase is Phase.TRAINING:
        life._have_one_soon()
