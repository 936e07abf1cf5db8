"""Gathers facts about this host."""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from downpour_deploy.agent import resources
from downpour_deploy.doctor.facts import DiskFacts, HostFacts, TorchFacts

TORCH_TIMEOUT_S = 60.0
"""The first import on a cold disk takes long."""
_SHARE_TIMEOUT_S = 20.0
_SHARED = b"downpour"
_TORCH = """
import json, torch
cuda = torch.version.cuda or ""
devices = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
print(json.dumps({"version": torch.__version__, "cuda": cuda, "devices": devices}))
"""
_ATTACH = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
memory = mmap.mmap(fd, os.fstat(fd).st_size)
memory[: len(sys.argv[2])] = sys.argv[2].encode()
"""
"""What :func:`downpour_common.sharing.attach` does, in a process of its own as there."""


def look(data_dir: str) -> HostFacts:
    """``data_dir``: where an agent would keep its files; "" for a temporary folder, as agents do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folders = dict.fromkeys(os.path.abspath(f) for f in (data_dir, tempfile.gettempdir()) if f)
    return HostFacts(
        python=platform.python_version(),
        version=version("downpour-ps"),
        cores=resources.cores(),
        host_cores=os.cpu_count() or 1,
        memory_bytes=resources.memory_bytes(),
        host_memory_bytes=_host_memory(),
        gpus=len(resources.gpus()),
        omp_threads=os.environ.get("OMP_NUM_THREADS", ""),
        files_soft=-1 if soft == resource.RLIM_INFINITY else soft,
        files_hard=-1 if hard == resource.RLIM_INFINITY else hard,
        shm_bytes=_shm(),
        shared_memory_error=_shared_memory_error(),
        torch=look_at_torch(),
        disks=tuple(map(look_at_disk, folders)),
    )


def look_at_torch(code: str = _TORCH, timeout_s: float = TORCH_TIMEOUT_S) -> TorchFacts:
    """Import torch in an interpreter of its own, which may take long, hang or crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return TorchFacts("", str(found["version"]), str(found["cuda"]), int(found["devices"]))
    except subprocess.TimeoutExpired:
        return TorchFacts(f"that took more than {timeout_s:g} s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return TorchFacts(lines[-1] if lines else f"the interpreter ended with {error.returncode}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        return TorchFacts(f"{type(error).__name__}: {error}")


def look_at_disk(path: str) -> DiskFacts:
    """The file system of ``path``, which need not be there yet."""
    there = Path(path)
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        facts = os.statvfs(there)
    except OSError:
        return DiskFacts(path, 0, False)
    return DiskFacts(path, facts.f_bavail * facts.f_frsize, there.is_dir() and os.access(there, os.W_OK | os.X_OK))


def _host_memory() -> int:
    try:
        found = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _shm() -> int:
    try:
        facts = os.statvfs("/dev/shm")
    except OSError:
        return -1
    return facts.f_blocks * facts.f_frsize


def _shared_memory_error() -> str:
    """Offer memory as a worker does, have another process map it as a shard does, and look what it wrote."""
    try:
        fd = os.memfd_create("downpour-doctor", os.MFD_CLOEXEC)
    except (AttributeError, OSError) as error:
        return f"memfd_create: {error}"
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        path = f"/proc/{os.getpid()}/fd/{fd}"
        command = [sys.executable, "-I", "-S", "-c", _ATTACH, path, _SHARED.decode()]
        subprocess.run(command, capture_output=True, text=True, timeout=_SHARE_TIMEOUT_S, check=True)
        return "" if os.pread(fd, len(_SHARED), 0) == _SHARED else "what one process wrote another does not see"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return lines[-1] if lines else f"the other process ended with {error.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        os.close(fd)
