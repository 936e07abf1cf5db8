"""What each process of a job is told when it is started: command, environment, sockets."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from downpour.context import WorkerContext
from downpour_common.config import JobSpec
from downpour_coordinator.state import JobFacts
from downpour_deploy.resolve import ResolvedJob
from downpour_server.config import ShardConfig

Process = tuple[list[str], dict[str, str]]
"""Command and environment."""


def endpoint(spec: JobSpec, runtime: str, name: str, port: int = 0) -> str:
    """Where the process called ``name`` listens: a socket in the private folder ``runtime``, or a loopback port."""
    if spec.settings.transport == "tcp":
        return f"tcp://127.0.0.1:{port or '*'}"
    return f"ipc://{runtime}/{name}"


def worker_process(spec: JobSpec, job_id: str, coordinator: str, slot: int) -> Process:
    """The user's script as worker ``slot``."""
    settings = spec.settings
    context = WorkerContext(
        job=job_id,
        slot=slot,
        worker_epoch=0,
        workers=spec.workers,
        shards=spec.shards,
        coordinator=coordinator,
        mode=spec.mode,
        device=spec.device,
        seed=spec.seed,
        buffers=settings.buffers,
        n_push=settings.n_push,
        n_fetch=settings.n_fetch,
        chunk_bytes=settings.chunk_bytes,
        window_bytes=settings.window_bytes,
        shared_memory=settings.shared_memory and settings.transport == "ipc",
        timeout_s=settings.timeout_s,
        start_timeout_s=settings.start_timeout_s,
    )
    return [sys.executable, "-u", spec.script, *spec.args], {**_environment(spec), **context.to_environment()}


def shard_process(spec: JobSpec, job_id: str, coordinator: str, index: int, address: str) -> Process:
    """Shard ``index``, listening at ``address``."""
    config = ShardConfig(
        job=job_id,
        shard=index,
        shard_epoch=0,
        coordinator=coordinator,
        endpoint=address,
        workers=spec.workers,
        shards=spec.shards,
        mode=spec.mode,
        chunk_bytes=spec.settings.chunk_bytes,
        timeout_s=spec.settings.timeout_s,
        start_timeout_s=spec.settings.start_timeout_s,
    )
    return [sys.executable, "-u", "-m", "downpour_server"], {**_environment(spec), **config.to_environment()}


def _environment(spec: JobSpec) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}


def job_facts(job: ResolvedJob, job_id: str) -> JobFacts:
    """What the coordinator is told: the job, and where a resumed one goes on."""
    spec, checkpoint = job.spec, job.checkpoint
    facts = JobFacts(job_id, spec.workers, spec.shards, spec.parsed_mode, spec.seed, spec.settings.chunk_bytes)
    if checkpoint is None:
        return facts
    data = checkpoint.manifest["data"]
    same_order = checkpoint.manifest["seed"] == spec.seed
    return replace(
        facts,
        resume=os.path.abspath(checkpoint.folder),
        clock=int(checkpoint.manifest["clock"]),
        epoch=int(data["epoch"]),
        done=tuple((int(a), int(b)) for a, b in data["done"]) if same_order else (),
    )
