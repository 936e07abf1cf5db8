"""An agent's folder on disk. Everything here blocks; the service calls it from other threads where it may take long.

::

    lock                    held by the agent that uses the folder
    bundles/DIGEST          code of jobs, known by its SHA-256
    jobs/JOB/work/          the bundle, unpacked: where the job's workers run
    jobs/JOB/logs/          what its processes wrote
    jobs/JOB/checkpoints/   what its shards start from and write

All of it is the owner's alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from typing import IO

from downpour_common import bundle
from downpour_common.errors import BundleError, ConfigError
from downpour_deploy.agent.effects import ProcessId

WORK = "work"
KEEP_BUNDLES = 8
"""Bundles kept beyond those of present jobs."""
_PREFIX = "downpour-agent-"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DataFolder:
    """The folder at ``path``, made if need be; "" for a temporary one, removed by :meth:`close`.

    Raises :class:`ConfigError` when another agent uses it, :class:`OSError`.
    """

    def __init__(self, path: str) -> None:
        self._temporary = not path
        if path:
            os.makedirs(path, mode=0o700, exist_ok=True)
            self.path = os.path.abspath(path)
            lock = _locked(self.path)
            if lock is None:
                raise ConfigError(f"--data-dir {path}: another agent uses it; give each agent a folder of its own")
            self._lock = lock
        else:
            _remove_abandoned(tempfile.gettempdir())
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            self._lock = _locked(self.path) or open(os.path.join(self.path, "lock"), "ab")  # noqa: SIM115
        shutil.rmtree(os.path.join(self.path, "jobs"), ignore_errors=True)  # of an agent that was killed
        for name in ("jobs", "bundles"):
            os.makedirs(os.path.join(self.path, name), mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Let go of the folder."""
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    # ------------------------------------------------------------ jobs

    def job(self, job: str) -> str:
        """The job's folder, made if need be."""
        path = os.path.join(self.path, "jobs", job)
        os.makedirs(os.path.join(path, "logs"), mode=0o700, exist_ok=True)
        return path

    def work(self, job: str) -> str:
        """Where the job's workers run, and where shards find an update rule that the job brings."""
        return os.path.join(self.path, "jobs", job, WORK)

    def log(self, process: ProcessId) -> str:
        """The file for the process' output."""
        again = f".{process.epoch}" if process.epoch else ""
        return os.path.join(self.job(process.job), "logs", f"{process.role}-{process.index}{again}.log")

    def remove_job(self, job: str) -> None:
        """Remove what there is of the job, and the oldest of the bundles that no job is using."""
        shutil.rmtree(os.path.join(self.path, "jobs", job), ignore_errors=True)
        folder = os.path.join(self.path, "bundles")
        with contextlib.suppress(OSError):
            bundles = [e for e in os.scandir(folder) if _DIGEST.fullmatch(e.name)]
            for entry in sorted(bundles, key=lambda e: e.stat().st_mtime)[:-KEEP_BUNDLES]:
                os.unlink(entry.path)

    def target(self, job: str, path: str) -> str:
        """Where a file of the job goes, in a folder made if need be. Raises :class:`BundleError` for a bad path."""
        parts = path.split("/")
        if not all(re.fullmatch(r"[A-Za-z0-9._-]+", part) and part not in (".", "..") for part in parts):
            raise BundleError(f"{path!r:.200}", "is no path within a job's folder")
        target = os.path.join(self.job(job), *parts)
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        return target

    # ------------------------------------------------------------ code

    def bundle(self, digest: str) -> str:
        """Where the bundle of this digest is kept. Raises :class:`BundleError`."""
        if not _DIGEST.fullmatch(digest):
            raise BundleError(f"{digest!r:.80}", "is no SHA-256")
        return os.path.join(self.path, "bundles", digest)

    def has_bundle(self, digest: str) -> bool:
        """Whether it is there and undamaged; a damaged one is removed."""
        path = self.bundle(digest)
        try:
            if bundle.digest_of(path) == digest:
                os.utime(path)
                return True
            os.unlink(path)
        except FileNotFoundError:
            pass
        return False

    def unpack(self, job: str, digest: str) -> None:
        """Make the job's work folder. Raises :class:`BundleError`."""
        self.job(job)
        bundle.unpack(self.bundle(digest), self.work(job), digest)


def _locked(folder: str) -> IO[bytes] | None:
    """The folder's lock file, locked as long as it is open; None when somebody else has it."""
    file = open(os.path.join(folder, "lock"), "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _remove_abandoned(base: str) -> None:
    """Remove temporary folders of agents of this user that were killed and so could not."""
    for name in os.listdir(base):
        path = os.path.join(base, name)
        lock = os.path.join(path, "lock")
        with contextlib.suppress(OSError):
            if not name.startswith(_PREFIX) or os.lstat(path).st_uid != os.geteuid() or not os.path.isfile(lock):
                continue
            held = _locked(path)
            if held is not None:
                shutil.rmtree(path, ignore_errors=True)
                held.close()
