"""From an order to start a process to what is given to the operating system."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from downpour_common.config import JobSpec, job_spec
from downpour_common.errors import ConfigError
from downpour_common.messages import Document
from downpour_deploy import launch
from downpour_deploy.agent.effects import ProcessId
from downpour_deploy.agent.folder import WORK

SHARD_THREADS = 4
"""Most threads of a shard where neither the job nor the number of slots says otherwise."""


@dataclass(frozen=True, slots=True)
class Host:
    """What processes on this host need to know of it."""

    coordinator: str
    """address, as the agent joined it"""
    bind: str
    """address that shards listen on, and are reached at"""
    cores: int
    slots: int
    gpus: tuple[str, ...]
    """as ``CUDA_VISIBLE_DEVICES`` names them"""
    device: str
    """what is used where a job leaves it open: auto | cpu | cuda"""
    environment: Mapping[str, str]
    """what processes inherit"""


def inherited(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The agent's environment without what is meant for the agent alone."""
    return {
        name: value
        for name, value in environment.items()
        if name not in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC") and not name.startswith("DOWNPOUR_")
    }


def process(host: Host, what: ProcessId, document: Document, folder: str) -> launch.Process:
    """Command and environment. ``folder`` is the job's. Raises :class:`ConfigError` for a useless order."""
    try:
        spec = job_spec(**document["spec"])
        keys = document["keys"]
        place = launch.Place(
            remote=True,
            epoch=what.epoch,
            workers=int(document["workers"]),
            threads=int(document["threads"]) or _threads(host, what.role),
            folder=folder,
            code=os.path.join(folder, WORK),
            follows=bool(document.get("follows", False)),
            term=int(document.get("term", -1)),
            keys=None if keys is None else dict(keys),
            environment=_environment(host, what.role, int(document["gpu"])),
        )
        coordinator = str(document["coordinator"]) or host.coordinator
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the order to start {what} is not of this version: {error!r}") from None
    if what.role == "server":
        address = f"tcp://{host.bind}:*"
        return launch.shard_process(spec, what.job, coordinator, what.index, address, place)
    return launch.worker_process(_for_device(spec, host), what.job, coordinator, what.index, place)


def _for_device(spec: JobSpec, host: Host) -> JobSpec:
    return spec.model_copy(update={"device": host.device}) if spec.device == "auto" and host.device != "auto" else spec


def _threads(host: Host, role: str) -> int:
    if role == "server" and not host.slots:
        return min(host.cores, SHARD_THREADS)
    return max(1, host.cores // max(1, host.slots))


def _environment(host: Host, role: str, gpu: int) -> dict[str, str]:
    if role != "worker" or (gpu < 0 and not host.gpus):
        return dict(host.environment)
    if gpu >= len(host.gpus):
        raise ConfigError(f"GPU {gpu} is not on this host, which has {len(host.gpus)}")
    # One that was given no GPU must not take another's.
    return {**host.environment, "CUDA_VISIBLE_DEVICES": host.gpus[gpu] if gpu >= 0 else ""}
