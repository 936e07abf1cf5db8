"""What this host has to offer, as far as this process may use it: cores, memory, GPUs, an address.

Functions take the root of the file system, so that tests can give them one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path("/")
GPU_TIMEOUT_S = 20.0
"""nvidia-smi takes seconds where it has to load the driver first."""


def cores(root: Path = ROOT) -> int:
    """Cores: those that the process may be scheduled on, no more than its control groups pay for; at least 1."""
    most = len(os.sched_getaffinity(0))
    return max(1, min([most, *(int(quota) for quota in _cpu_quotas(root))]))


def memory_bytes(root: Path = ROOT) -> int:
    """Bytes of memory: the host's, no more than the limits of the process' control groups; 0 when nobody knows."""
    limits = list(_memory_limits(root))
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if found:
        limits.append(int(found[1]) * 1024)
    return min(limits, default=0)


def _cpu_quotas(root: Path) -> Iterator[float]:
    """In cores, one for each control group that has a quota."""
    for folder in _groups(root, ""):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu"):
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for folder in _groups(root, controller):
            limit = _read(folder / name).strip()
            if limit.isdecimal():
                yield int(limit)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process' control group and those above it; ``controller`` is "" for version 2.

    In a container the path is often the host's, while only the group itself is mounted, as if it were the root.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup"
        if controller:
            base /= next((c for c in (controllers, controller) if (base / c).is_dir()), controller)
        parts = [part for part in path.split("/") if part and part != ".."]
        for count in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:count])
            if folder.is_dir():
                yield folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def gpus(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """NVIDIA GPUs, each as ``CUDA_VISIBLE_DEVICES`` would name it: the agent's own list where it has one."""
    count = _count_gpus(root)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(str(index) for index in range(count))
    listed = []
    for name in (part.strip() for part in visible.split(",")):
        if not name or name == "-1" or (name.isdecimal() and int(name) >= count):
            break  # CUDA, too, stops at the first that is not there
        listed.append(name)
    return tuple(listed) if count else ()


def _count_gpus(root: Path) -> int:
    command = shutil.which("nvidia-smi") if root == ROOT else None
    if command:  # it knows which GPUs a container was given; the driver's list has all
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [command, "-L"], capture_output=True, text=True, timeout=GPU_TIMEOUT_S, check=True, errors="replace"
            )
            return len(re.findall(r"^GPU \d+:", done.stdout, re.MULTILINE))
    try:
        return len(os.listdir(root / "proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def address_towards(host: str, port: int) -> str:
    """This host's address on the route to ``host``. Raises :class:`OSError`, also while the name is not known yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, port))  # sends nothing
        return str(sock.getsockname()[0])


def boot_id(root: Path = ROOT) -> str:
    """Differs between hosts and changes when one is started anew; "" where the kernel does not tell."""
    return _read(root / "proc/sys/kernel/random/boot_id").strip()


def host_name() -> str:
    """The host's name, as it calls itself."""
    return socket.gethostname() or platform.node() or "unnamed"


def node_name(host: str, role: str) -> str:
    """``host-role`` in [a-z0-9-], at most 64 characters."""
    plain = re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-") or "node"
    return f"{plain[: 63 - len(role)].rstrip('-')}-{role}"
