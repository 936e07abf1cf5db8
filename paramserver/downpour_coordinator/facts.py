"""What is known of a job before it begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from downpour_common.config import JobSpec
from downpour_common.modes import Mode, parse_mode
from downpour_coordinator.leases import Span


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What a job's training must know. ``resume`` is a checkpoint folder or "", ``clock``, ``epoch`` and ``done`` are
    where that left off; ``shard_epoch`` grows with every start of the whole job."""

    job: str
    workers: int
    shards: int
    mode: Mode
    seed: int
    chunk_bytes: int
    resume: str = ""
    clock: int = 0
    epoch: int = 0
    done: tuple[Span, ...] = ()
    shard_epoch: int = 0
    resume_files: tuple[str, ...] = ()
    """the checkpoint's files, beside its manifest"""
    replication: int = 1
    """processes of each shard"""
    ranks: int = 1
    """workers of each replica of the model"""

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {**asdict(self), "mode": str(self.mode)}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> JobFacts:
        """The inverse of :meth:`document`."""
        done = tuple((a, b) for a, b in document["done"])
        files = tuple(document["resume_files"])
        return cls(**{**document, "mode": parse_mode(document["mode"]), "done": done, "resume_files": files})


def facts_for(job: str, spec: JobSpec, checkpoint: dict[str, Any] | None, folder: str) -> JobFacts:
    """What a job begins with: nothing, or where the manifest ``checkpoint`` in ``folder`` left off."""
    facts = JobFacts(
        job,
        spec.workers,
        spec.shards,
        spec.parsed_mode,
        spec.seed,
        spec.settings.chunk_bytes,
        replication=spec.replication,
        ranks=spec.ranks,
    )
    if checkpoint is None:
        return facts
    data = checkpoint["data"]
    return replace(
        facts,
        resume=folder,
        resume_files=tuple(entry["file"] for entry in checkpoint["files"]),
        clock=int(checkpoint["clock"]),
        epoch=int(data["epoch"]),
        done=tuple((int(a), int(b)) for a, b in data["done"]) if checkpoint["seed"] == spec.seed else (),
    )
