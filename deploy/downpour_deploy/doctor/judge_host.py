"""Verdicts about this host."""

from __future__ import annotations

import re

from downpour_common.sizes import format_bytes
from downpour_deploy.doctor.facts import DiskFacts, HostFacts, TorchFacts
from downpour_deploy.doctor.verdict import Verdict, failed, passed, warned

FEWEST_FILES = 4096
"""A connection is a descriptor, and a process of a job has one to each process of the other side, and some more."""
PROCESS_BYTES = 512 << 20
"""What a process with torch takes before it has a model, rounded up."""
SHM_BYTES = 256 << 20
DISK_WARN_BYTES, DISK_FAIL_BYTES = 2 << 30, 100 << 20
OLDEST_TORCH = (2, 6)
OLDEST_PYTHON = (3, 11)


def all_of(host: HostFacts, role: str) -> list[Verdict]:
    """Every verdict."""
    verdicts = [python(host), torch(host.torch, host.gpus, role), cores(host), memory(host, role)]
    verdicts += [files(host), shared_memory(host, role), shm(host, role)]
    return verdicts + [disk(found) for found in host.disks]


def python(host: HostFacts) -> Verdict:
    """Whether Python is new enough."""
    if _numbers(host.python) >= OLDEST_PYTHON:
        return passed("python", f"{host.python}, downpour-ps {host.version}")
    return failed("python", host.python, "install Python 3.11 or newer, and downpour-ps with it")


def torch(found: TorchFacts, gpus: int, role: str) -> Verdict:
    """Whether torch can be imported and fits the host. Users need none."""
    if found.error:
        detail = f"it cannot be imported: {found.error}"
        action = "install torch 2.6 or newer beside downpour-ps, and try `python -c 'import torch'`"
        return passed("torch", f"{detail}; this role needs none") if role == "user" else failed("torch", detail, action)
    build = f"CUDA {found.cuda}" if found.cuda else "CPU"
    detail = f"{found.version} ({build} build)"
    if _numbers(found.version) < OLDEST_TORCH:
        action = "install torch 2.6 or newer"
        return warned("torch", detail, action) if role == "user" else failed("torch", detail, action)
    if role != "worker" or not gpus:
        return passed("torch", detail)
    if not found.cuda:
        action = "install a torch with CUDA, or start the worker with --device cpu"
        return warned("torch", f"{detail}, but this host has {_count(gpus, 'GPU')}", action)
    if found.devices < gpus:
        action = "look at `nvidia-smi` and the driver's version, or start the worker with --device cpu"
        return warned("torch", f"{detail} can use {found.devices} of {_count(gpus, 'GPU')}", action)
    return passed("torch", f"{detail}, {_count(gpus, 'GPU')}")


def cores(host: HostFacts) -> Verdict:
    """Whether threads are no more than cores."""
    limited = f" of {host.host_cores} (affinity or control group)" if host.cores < host.host_cores else ""
    detail = f"{_count(host.cores, 'core')}{limited}"
    if host.omp_threads.isdecimal() and int(host.omp_threads) > host.cores:
        action = f"unset OMP_NUM_THREADS, or set it to {host.cores} at most"
        return warned("cores", f"{detail}, but OMP_NUM_THREADS is {host.omp_threads}", action)
    slots = host.gpus or host.cores
    per_slot = max(1, host.cores // slots)
    return passed("cores", f"{detail}; as a worker: {_count(slots, 'slot')} of {_count(per_slot, 'thread')}")


def memory(host: HostFacts, role: str) -> Verdict:
    """Whether processes fit into memory."""
    if not host.memory_bytes:
        return passed("memory", "unknown")
    detail = format_bytes(host.memory_bytes)
    if host.memory_bytes < host.host_memory_bytes:
        detail += f" of {format_bytes(host.host_memory_bytes)} (control group)"
    slots = (host.gpus or host.cores) if role == "worker" else 1
    if role == "user" or host.memory_bytes >= slots * PROCESS_BYTES:
        return passed("memory", detail)
    if role == "worker" and host.memory_bytes >= PROCESS_BYTES:
        fitting = host.memory_bytes // PROCESS_BYTES
        action = f"start the worker with --slots {fitting}, or give it more memory"
        return warned("memory", f"{detail} for {slots} worker processes", action)
    return warned("memory", f"{detail}: too little for a process with torch", "give it at least 512 MiB")


def files(host: HostFacts) -> Verdict:
    """Whether enough files may be open. The coordinator raises its own limit as far as it may."""
    if host.files_hard < 0 or host.files_hard >= FEWEST_FILES:
        most = "no limit" if host.files_hard < 0 else str(host.files_hard)
        return passed("open-files", f"{_or_none(host.files_soft)}, can be raised to {most}")
    detail = f"at most {host.files_hard}, and every connection is one"
    return warned("open-files", detail, f"raise the hard limit to {FEWEST_FILES} or more (ulimit -Hn, LimitNOFILE=)")


def shared_memory(host: HostFacts, role: str) -> Verdict:
    """Whether workers and shards of this host can share memory. Where they cannot, bytes go through sockets."""
    if not host.shared_memory_error:
        return passed("shared-memory", "processes of this user can share memory (memfd through /proc)")
    if role == "user":
        return passed("shared-memory", f"not possible ({host.shared_memory_error}); this role needs none")
    detail = f"workers and shards of this host cannot share memory: {host.shared_memory_error}"
    return warned(
        "shared-memory", detail, "allow processes of one user to open each other's /proc/PID/fd (hidepid, seccomp)"
    )


def shm(host: HostFacts, role: str) -> Verdict:
    """Whether torch's DataLoader can have processes of its own. Downpour itself does not use /dev/shm."""
    if role != "worker":
        return passed("dev-shm", "this role needs none")
    if host.shm_bytes >= SHM_BYTES:
        return passed("dev-shm", format_bytes(host.shm_bytes))
    detail = "not there" if host.shm_bytes < 0 else format_bytes(host.shm_bytes)
    detail += ": too little for a DataLoader with num_workers > 0"
    return warned("dev-shm", detail, "make /dev/shm larger (in a container: --shm-size 1g)")


def disk(found: DiskFacts) -> Verdict:
    """Whether there is room for code, logs and checkpoints."""
    detail = f"{found.path}: {format_bytes(found.free_bytes)} free"
    if not found.writable:
        return failed("disk", f"{found.path} cannot be written to", "give another folder with --data-dir")
    if found.free_bytes < DISK_FAIL_BYTES:
        return failed("disk", detail, "make room there, or give another folder with --data-dir")
    if found.free_bytes < DISK_WARN_BYTES:
        return warned("disk", detail, "make room there: code, logs and checkpoints of jobs need it")
    return passed("disk", detail)


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 6) of "2.6.1+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _or_none(limit: int) -> str:
    return "no limit" if limit < 0 else str(limit)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
