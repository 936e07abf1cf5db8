"""What each process of a job is told when it is started: command, environment, sockets."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from downpour.context import WorkerContext
from downpour_common.compensation import SPARE_BASES
from downpour_common.config import JobSpec
from downpour_common.measures import unmeasured
from downpour_coordinator.facts import JobFacts, facts_for
from downpour_deploy.resolve import ResolvedJob
from downpour_server.config import ShardConfig

SPIN_COUNT = "10000"
"""How long GNU OpenMP's threads spin for more work, about 0.2 ms: until the next piece of the same computation. Its
default is milliseconds, in which workers and shards, which compute in turns, take the cores from each other."""

GLOO_INTERFACE, LOOPBACK = "GLOO_SOCKET_IFNAME", "lo"
"""The workers of a replica are on one host. Left alone, gloo looks the host's own name up, which may lead anywhere."""

Process = tuple[list[str], dict[str, str]]
"""Command and environment."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs and what it is told besides the job: at its default, by ``downpour run`` on this machine."""

    remote: bool = False
    """on a host of a cluster, where an agent starts it"""
    epoch: int = 0
    workers: int = 0
    """members at the start; 0: as many as the job wants"""
    threads: int = 0
    """of the process, where the job leaves it open; see :mod:`downpour_deploy.threads`"""
    folder: str = ""
    """the job's folder on that host"""
    code: str = ""
    """where the script's path begins there; empty: here"""
    follows: bool = False
    """with replication: a shard's process that is started as a backup"""
    term: int = -1
    """… or leads in this term; -1: its epoch"""
    keys: dict[str, Any] | None = None
    """see :mod:`downpour_common.jobkeys`"""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """what the process inherits"""


def endpoint(spec: JobSpec, runtime: str, name: str, port: int = 0) -> str:
    """Where the process called ``name`` listens: a socket in the private folder ``runtime``, or a loopback port."""
    if spec.settings.transport == "tcp":
        return f"tcp://127.0.0.1:{port or '*'}"
    return f"ipc://{runtime}/{name}"


def worker_process(spec: JobSpec, job_id: str, coordinator: str, slot: int, place: Place | None = None) -> Process:
    """The user's script as worker ``slot``."""
    place = place or Place()
    settings = spec.settings
    context = WorkerContext(
        job=job_id,
        slot=slot,
        worker_epoch=place.epoch,
        workers=place.workers or spec.workers,
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
        shared_memory=settings.shared_memory and (place.remote or settings.transport == "ipc"),
        timeout_s=settings.timeout_s,
        start_timeout_s=settings.start_timeout_s,
        keys=place.keys,
        overlap=settings.overlap,
        push_dtype=settings.push_dtype,
        fetch_ahead=settings.fetch_ahead,
        fetch=settings.fetch,
        memory=settings.memory,
        in_place=settings.in_place and spec.replication == 1 and spec.ranks == 1,
        on_nan=settings.on_nan,
        autocast=settings.autocast,
        activation_checkpointing=settings.activation_checkpointing,
        trace=spec.trace,
        widths=spec.widths,
        schedule=spec.schedule,
        microbatches=spec.microbatches,
        interleave=spec.interleave,
        rule=spec.rule,
        compress=spec.compress,
        warm_start=settings.warm_start,
        clip=settings.clip,
        inject_staleness=settings.inject_staleness,
    )
    environment = {**_environment(spec, place), **context.to_environment()}
    if spec.ranks > 1:
        environment.setdefault(GLOO_INTERFACE, LOOPBACK)
    return [sys.executable, "-u", spec.script, *spec.args], environment


def shard_process(
    spec: JobSpec, job_id: str, coordinator: str, index: int, address: str, place: Place | None = None
) -> Process:
    """Server process ``index``, listening at ``address``; with replication there are two for each shard."""
    place = place or Place()
    config = ShardConfig(
        job=job_id,
        shard=index % spec.shards,
        process=index,
        follows=place.follows,
        term=place.term,
        shard_epoch=place.epoch,
        coordinator=coordinator,
        endpoint=address,
        workers=place.workers or spec.workers,
        shards=spec.shards,
        mode=spec.mode,
        chunk_bytes=spec.settings.chunk_bytes,
        timeout_s=spec.settings.timeout_s,
        start_timeout_s=spec.settings.start_timeout_s,
        folder=place.folder,
        upload=place.remote,
        push_dtype=spec.settings.push_dtype,
        keep_previous=spec.parsed_mode.synchronous and spec.restarts > 0,
        skip_non_finite=spec.settings.on_nan != "fail",
        rule=spec.rule,
        script_folder=os.path.abspath(os.path.join(place.code, os.path.dirname(spec.script))) if spec.rule else "",
        compress=spec.compress,
        compensation=spec.settings.compensation,
        bases=SPARE_BASES + spec.settings.inject_staleness,
        warm_start=spec.settings.warm_start,
        measure_noise=not unmeasured(spec),
        keys=place.keys,
    )
    return [sys.executable, "-u", "-m", "downpour_server"], {**_environment(spec, place), **config.to_environment()}


def _environment(spec: JobSpec, place: Place) -> dict[str, str]:
    threads = str(spec.threads or place.threads or 1)
    chosen = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & {*place.environment, *spec.env}:
        chosen["GOMP_SPINCOUNT"] = SPIN_COUNT
    return {**place.environment, **chosen, **spec.env}


def job_facts(job: ResolvedJob, job_id: str) -> JobFacts:
    """What the coordinator is told: the job, and where a resumed one goes on."""
    checkpoint = job.checkpoint
    if checkpoint is None:
        return facts_for(job_id, job.spec, None, "")
    return facts_for(job_id, job.spec, checkpoint.manifest, os.path.abspath(checkpoint.folder))
