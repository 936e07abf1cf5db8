"""The coordinator's files: bundles of code by digest, and a folder per job. Nothing outside ``data_dir`` is touched.

::

    data_dir/coordinator.db                  the journal
    data_dir/bundles/DIGEST                  code, verified
    data_dir/jobs/JOB/{job.toml, metrics.jsonl, logs/, checkpoints/NNNNNN/, model.safetensors}
"""

from __future__ import annotations

import os
import re
import shutil

from downpour_common import messages as m
from downpour_common.bundle import LIMITS, digest_of
from downpour_common.errors import ConfigError
from downpour_common.messages import Message, Refusal

DIGEST = re.compile(r"[0-9a-f]{64}")
PART_BYTES = 1 << 20
"""Most bytes of a file in one answer."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Files:
    """See the module. Raises :class:`ConfigError` when ``data_dir`` cannot be made."""

    def __init__(self, data_dir: str) -> None:
        self.data_dir = os.path.abspath(data_dir)
        try:
            for folder in (self.data_dir, self.bundles, self.jobs):
                os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--data-dir {data_dir}: {error.strerror}") from None

    @property
    def bundles(self) -> str:
        """Where bundles lie."""
        return os.path.join(self.data_dir, "bundles")

    @property
    def jobs(self) -> str:
        """Where the jobs' folders lie."""
        return os.path.join(self.data_dir, "jobs")

    def job(self, job: str) -> str:
        """The folder of ``job``, whose name is one that the coordinator has made."""
        return os.path.join(self.jobs, job)

    def has_bundle(self, digest: str) -> bool:
        """Whether this bundle is complete."""
        return bool(DIGEST.fullmatch(digest)) and os.path.exists(os.path.join(self.bundles, digest))

    def put_bundle(self, part: m.PutBundle) -> Message:
        """Take a part of a bundle; the answer says how much there is, so that gaps and repeats heal."""
        if not DIGEST.fullmatch(part.digest) or part.total <= 0 or part.offset < 0:
            return m.Refused(part.request, Refusal.MALFORMED.value, "a bundle has a SHA-256 digest and a size")
        if part.total > LIMITS.total_bytes * 2:
            reason = f"the bundle has {part.total} bytes, the limit is {LIMITS.total_bytes * 2}"
            return m.Refused(part.request, Refusal.TOO_LARGE.value, reason)
        path = os.path.join(self.bundles, part.digest)
        if os.path.exists(path):
            return m.Ack(part.request, part.total)
        incoming = path + ".part"
        try:
            with open(incoming, "ab") as file:
                held = file.tell()
                size = memoryview(part.payload).nbytes
                if held == part.offset and size and held + size <= part.total:
                    file.write(part.payload)
                    held = file.tell()
            if held < part.total:
                return m.Ack(part.request, held)
            if digest_of(incoming) != part.digest:
                os.unlink(incoming)
                reason = "the bundle does not match its digest; it must be sent again"
                return m.Refused(part.request, Refusal.MALFORMED.value, reason)
            os.rename(incoming, path)
        except OSError as error:
            return m.Refused(part.request, Refusal.UNUSABLE.value, f"the coordinator cannot store it: {error.strerror}")
        return m.Ack(part.request, part.total)

    def put_log(self, data: m.LogData) -> Message:
        """Append output of a process; the answer says how much there is."""
        if data.role not in ("server", "worker") or min(data.index, data.epoch, data.offset) < 0:
            return m.Refused(data.request, Refusal.MALFORMED.value, "there is no such log")
        name = f"{data.role}-{data.index}" + (f".{data.epoch}" if data.epoch else "") + ".log"
        folder = os.path.join(self.job(data.job), "logs")
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, name), "ab") as file:
                held = file.tell()
                fresh = memoryview(data.payload)[max(0, held - data.offset) :]
                if data.offset <= held and fresh.nbytes:
                    file.write(fresh)
                    held = file.tell()
        except OSError as error:
            return m.Refused(data.request, Refusal.NOT_READY.value, f"the log cannot be written: {error.strerror}")
        return m.Ack(data.request, held)

    def list(self, job: str) -> list[list[str | int]]:
        """[path, bytes] of each file of a job, without unfinished ones."""
        root = self.job(job)
        found: list[list[str | int]] = []
        for folder, _, names in os.walk(root):
            for name in sorted(names):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root)
                if all(_NAME.fullmatch(part) for part in relative.split("/")):
                    try:
                        found.append([relative, os.path.getsize(path)])
                    except OSError:
                        continue  # gone this instant
        return sorted(found)

    def read(self, get: m.GetFile, bundle: str) -> Message:
        """A piece of one of the job's files, or of its ``bundle``."""
        if get.path == "bundle":
            path = os.path.join(self.bundles, bundle)
        elif all(_NAME.fullmatch(part) for part in get.path.split("/")):
            path = os.path.join(self.job(get.job), get.path)
        else:
            reason = f"{get.path!r} is no path of a job's file"
            return m.Refused(get.request, Refusal.MALFORMED.value, reason)
        if get.offset < 0 or get.length < 0:
            return m.Refused(get.request, Refusal.MALFORMED.value, "offset and length are not negative")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                data = os.pread(fd, min(get.length, PART_BYTES), get.offset)
            finally:
                os.close(fd)
        except OSError as error:
            return m.Refused(get.request, Refusal.UNKNOWN.value, f"{get.path}: {error.strerror}")
        return m.FileData(get.request, size, get.offset, data)

    def adopt_checkpoint(self, source: str, number: int, job: str) -> None:
        """Make checkpoint ``number`` of job ``source`` one of ``job``'s own. Raises ``OSError``."""
        name = f"{number:06d}"
        target = os.path.join(self.job(job), "checkpoints", name)
        shutil.copytree(os.path.join(self.job(source), "checkpoints", name), target, copy_function=_link)


def _link(source: str, target: str) -> str:
    """Checkpoints are never changed, so two jobs may share the bytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
