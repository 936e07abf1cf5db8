"""Jobs and nodes as users are shown them: the documents of ``downpour status``, ``list`` and ``nodes``."""

from __future__ import annotations

from typing import Any

from downpour_common.replicas import is_lead
from downpour_coordinator.cluster import Cluster, JobRecord
from downpour_coordinator.nodes import Node
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Process
from downpour_coordinator.training import Training

_SHORT = ("throughput", "noise_scale", "efficiency", "goodput", "staleness")
"""Measures that a list of jobs has."""


def job_document(cluster: Cluster, record: JobRecord, now_s: float, full: bool = True) -> dict[str, Any]:
    """One job; ``full``: with its specification, processes, result and the details of its failure."""
    life = record.life
    training = life.training
    failure = life.failure or life.last_failure
    progress = (w.progress for w in training.workers.values() if is_lead(w.slot, life.spec.ranks))
    reports = [p for p in progress if p is not None]
    outcome = outcome_of(life, "", record.ended_s or now_s)
    began_s = record.started_s or record.submitted_s
    measured = outcome.measures.document() if outcome.measures else {}
    document: dict[str, Any] = {
        "job": record.job,
        "name": life.spec.name,
        "user": record.user,
        "state": life.state,
        "reason": life.reason,
        "message": _message(record),
        "failure": {**failure.document(), **({} if full else {"details": ""})} if failure else None,
        "submitted_s": record.submitted_s,
        "started_s": record.started_s,
        "ended_s": record.ended_s,
        "elapsed_s": round((record.ended_s or now_s) - began_s, 3),
        "waiting_for": life.waiting_for(),
        "waiting_s": round(life.waited_s(now_s), 3) if not life.over else 0.0,
        "position": _position(cluster, record),
        "workers": {"wanted": life.wanted, "live": len(training.live()), "min": life.fewest},
        "replicas": life.wanted // life.spec.ranks,
        "ranks": life.spec.ranks,
        "shards": life.spec.shards,
        "replication": life.spec.replication,
        "mode": life.spec.mode,
        "restarts": life.restarts,
        "restarts_limit": life.spec.restarts,
        "clock": training.clock(),
        "epoch": min((p.epoch for p in reports), default=training.facts.epoch),
        "samples": outcome.samples,
        "samples_per_s": round(outcome.samples_per_s, 3),
        "metrics": outcome.document()["metrics"],
        "target": outcome.target,
        **{name: value for name, value in measured.items() if full or name in _SHORT},
        "torn_samples": training.torn_samples(),
        "degraded": life.degraded,
        "checkpointing": life.checkpoints.document(now_s if record.ended_s is None else record.ended_s),
        "lost_pushes": outcome.lost_pushes,
        "late": outcome.late,
        "warnings": life.remarks,
        "exit_code": outcome.exit_code if life.over else None,
        "model": bool(life.model),
    }
    if full:
        document["processes"] = [_process(cluster, record, p) for p in life.processes.values()]
        document["spec"] = life.spec.model_dump(mode="json")
        figures = {**outcome.document(), "job": record.job}
        document["result"] = figures if life.over else None
        document["so_far"] = None if life.over else figures
    return document


def _message(record: JobRecord) -> str:
    life = record.life
    if life.failure is not None:
        where = f" on {life.failure.host}" if life.failure.host else ""
        return f"{life.failure.who} failed{where}: {life.failure.message}".lstrip()
    return record.message or life.degraded


def _position(cluster: Cluster, record: JobRecord) -> int:
    if record.life.phase is not Phase.QUEUED:
        return 0
    return 1 + cluster.queue().index(record)


def _process(cluster: Cluster, record: JobRecord, process: Process) -> dict[str, Any]:
    state: str = process.state
    node = cluster.nodes.get(process.node)
    if state == "started":
        line = node.reported.get((record.job, process.role, process.index, process.epoch), {}) if node else {}
        state = str(line.get("state", "starting"))
    return {
        "name": process.name,
        "role": process.role,
        "index": process.index,
        "epoch": process.epoch,
        "part": _part(record.life.training, process),
        "node": process.node,
        "state": "stopping" if process.running and process.stop is not None else state,
        "exit_code": process.code,
        "pid": process.pid,
    }


def _part(training: Training, process: Process) -> str:
    """With replication: what a server process does for its shard. In replicas of several workers: a worker's place."""
    if process.role == "worker" and process.ranks > 1:
        return f"replica {process.index // process.ranks}, rank {process.index % process.ranks}"
    if process.role != "server" or training.facts.replication == 1:
        return ""
    if not training.follows(process.index):
        return "leads"
    backup = training.backups.get(process.index % training.facts.shards)
    return "backup" if backup is not None and backup.promotable else "catches up"


def node_document(cluster: Cluster, node: Node, now_s: float) -> dict[str, Any]:
    """One node."""
    placed = [
        (r, p) for r in cluster.jobs.values() for p in r.life.processes.values() if p.node == node.name and p.running
    ]
    memory = sum(r.life.spec.shard_memory for r, p in placed if p.role == "server")
    message = ""
    if node.state == "DRAINING" and placed:
        message = f"draining; {len(placed)} process(es) of {', '.join(sorted({r.job for r, _ in placed}))} are left"
    facts = node.facts
    return {
        "node": node.name,
        "role": node.role,
        "state": node.state,
        "host": facts["host"],
        "address": facts["address"],
        "cores": facts["cores"],
        "memory_bytes": facts["memory_bytes"],
        "gpus": facts["gpus"],
        "labels": facts["labels"],
        "slots": facts["slots"],
        "used": len(placed),
        "memory_used": memory,
        "last_seen_s": round(max(0.0, now_s - node.seen_s), 3),
        "version": facts["version"],
        "processes": [{"job": r.job, "role": p.role, "index": p.index, "name": p.name} for r, p in placed],
        "message": message,
    }
