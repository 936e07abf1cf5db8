"""From a script or a job file to a job at the coordinator."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from downpour.jobs.client import ClusterClient
from downpour.jobs.errors import BadJobFile, ClusterError, CoordinatorUnreachable, JobRefused
from downpour.jobs.logs import PART_BYTES
from downpour_common.bundle import Bundle, pack
from downpour_common.config import JobSpec, job_spec
from downpour_common.errors import BundleError, ConfigError
from downpour_common.jobfile import load, merge, travelling
from downpour_common.messages import Ack, Document, PutBundle, Refusal, Reply, SubmitJob
from downpour_common.modes import with_groups
from downpour_common.optimizers import missing_rule
from downpour_common.replicas import ranks_given

_FRUITLESS = 3
"""Parts in a row that the coordinator took nothing of."""
Progress = Callable[[int, int], None]
"""Called with bytes sent and bytes in all."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that can travel: its description, with a script relative to ``folder``, and its code as one file."""

    spec: JobSpec
    folder: str
    bundle: Bundle
    path: str
    """the bundle's file"""

    def document(self) -> Document:
        """For people who want to see before they send."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "folder": self.folder,
            "bundle": {
                "digest": self.bundle.digest,
                "bytes": self.bundle.nbytes,
                "files": [[file.path, file.size] for file in self.bundle.files],
            },
        }


def describe(
    script: str, fields: Mapping[str, Any], problems: tuple[str, ...] = (), group_modes: Sequence[str] = ()
) -> tuple[JobSpec, str]:
    """The job of ``script`` (a ``.py`` file, or a job file ``.toml``) with ``fields``, and the folder to send.

    ``fields`` are those of :class:`JobSpec`, None for what was not said; they win over the job file's. ``problems``
    are found already. ``group_modes``: ``GROUP=MODE`` to add to the mode, wherever that is from. Raises
    :class:`ConfigError` with all problems, :class:`BadJobFile` when a job file was given.
    """
    found = list(problems)
    from_file: dict[str, object] = {}
    is_file = script.endswith(".toml")
    spec = None
    try:
        if not is_file:
            from_file = {"script": script}
        elif not os.path.isfile(script):
            raise ConfigError(f"{script}: no such file; give the path of a training script or a job file")
        else:
            from_file = load(script)
        merged = merge(from_file, dict(fields))
        if group_modes:
            merged["mode"] = with_groups(str(merged.get("mode", "async")), group_modes)
        path = str(merged.get("script", ""))
        if path and not os.path.isfile(path):
            found.append(f"{path}: no such file; give the path of the training script")
        elif path:
            found += missing_rule(str(merged.get("rule") or ""), path)
        merged.setdefault("workers", ranks_given(merged.get("tensor"), merged.get("pipeline")))
        merged.setdefault("shards", 1)
        if path:
            merged.setdefault("name", name_of(path))
        spec = job_spec(**merged)
    except ConfigError as error:
        found += error.problems
    if not found and spec is not None:
        try:
            return travelling(spec)
        except ConfigError as error:
            found += error.problems
    raise (BadJobFile if is_file else ConfigError)(*found)


def name_of(script: str) -> str:
    """A job's name from its script's."""
    stem = os.path.splitext(os.path.basename(script))[0].lower()
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40] or "job"


@contextlib.contextmanager
def packed(spec: JobSpec, folder: str) -> Iterator[Submission]:
    """Pack ``folder`` into a temporary file, which is there inside the ``with``. Raises :class:`BundleError`."""
    with tempfile.TemporaryDirectory(prefix="downpour-") as temporary:
        path = os.path.join(temporary, "bundle")
        bundle = pack(folder, path)
        if spec.script not in {file.path for file in bundle.files}:
            raise BundleError(folder, f"{spec.script}: the script itself stays at home; see .downpourignore")
        yield Submission(spec, folder, bundle, path)


def send(
    client: ClusterClient,
    submission: Submission,
    anyway: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Document:
    """Send the code, unless the coordinator has it, and submit the job; its document.

    Once submitted, however often the message arrives: by the token. ``dry_run`` sends no code and starts nothing.
    ``anyway``: queue a job for which the cluster is too small today. Raises :class:`JobRefused` and the rest.
    """
    request: Document = {"spec": submission.spec.model_dump(mode="json"), "anyway": anyway, "dry_run": dry_run}
    token = secrets.token_hex(16)
    for last in (False, True):
        if not dry_run:
            upload(client, submission, progress)
        try:
            return client.ask(Reply, SubmitJob, token, submission.bundle.digest, request).document
        except JobRefused as error:
            # Code that nobody used for long may be dropped between our asking for it and our using it.
            if error.code != Refusal.NOT_READY or last or dry_run:
                raise _with_hint(error) from None
        except CoordinatorUnreachable as error:
            if dry_run:
                raise
            raise MaybeSubmitted(error) from error
    raise AssertionError


class MaybeSubmitted(CoordinatorUnreachable):
    """The coordinator went away before it could confirm the job."""

    def __init__(self, error: CoordinatorUnreachable) -> None:
        ClusterError.__init__(
            self, f"{error}. The job may have been accepted: look with `downpour list` before you submit it again"
        )
        self.address = error.address
        self.after_s = error.after_s


def upload(client: ClusterClient, submission: Submission, progress: Progress | None = None) -> int:
    """Have the bundle at the coordinator; the bytes that were sent for it."""
    bundle, sent, fruitless = submission.bundle, 0, 0
    held = client.ask(Ack, PutBundle, bundle.digest, bundle.nbytes, 0, b"").version
    with open(submission.path, "rb") as file:
        while held < bundle.nbytes:
            file.seek(max(0, held))
            part = file.read(PART_BYTES)
            before = held
            held = client.ask(Ack, PutBundle, bundle.digest, bundle.nbytes, before, part).version
            sent += len(part)
            fruitless = fruitless + 1 if held <= before else 0
            if fruitless == _FRUITLESS:
                raise JobRefused(Refusal.UNUSABLE, f"the coordinator holds {held} bytes of the code and takes no more")
            if progress is not None:
                progress(held, bundle.nbytes)
    return sent


def _with_hint(error: JobRefused) -> JobRefused:
    if error.code == Refusal.TOO_LARGE and "--anyway" not in error.reason:
        return JobRefused(error.code, f"{error.reason}; ask for less, or queue it until there is more with --anyway")
    return error
