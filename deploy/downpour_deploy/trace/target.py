"""What a user means by RUN: a folder, or a job of a cluster; and its trace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from downpour.jobs.download import read
from downpour.jobs.status import job_status
from downpour_common.errors import ConfigError
from downpour_common.spans import FILE
from downpour_coordinator.urls import is_url
from downpour_deploy.jobs.named import cluster_of
from downpour_deploy.trace.read import Trace, parse


@contextmanager
def opened(name: str, join: str | None, keys: str | None, security: str | None, timeout_s: float) -> Iterator[Trace]:
    """The trace of ``name``. Raises :class:`ConfigError` where there is none, and what clients raise."""
    if is_url(name):
        raise ConfigError(f"{name}: give the run directory or the job; traces are not copied to URLs")
    if os.path.isdir(name):
        path = os.path.join(name, FILE)
        if not os.path.exists(path):
            raise ConfigError(_untraced(name))
        with open(path, "rb") as file:
            yield parse(file, path)
    elif os.path.lexists(name):
        raise ConfigError(f"{name}: is a file; give the run directory that {FILE} lies in")
    else:
        with cluster_of(name, join, keys, security, timeout_s) as client:
            job = job_status(client.describe(name)).id
            sizes = dict(client.files(job))
            if FILE not in sizes:
                raise ConfigError(_untraced(f"job {job}"))
            whole = b"".join(read(client, job, FILE, sizes[FILE]))
        yield parse(whole.splitlines(), f"job {job}: {FILE}")


def _untraced(place: str) -> str:
    return f"{place}: has no {FILE}; a job is traced if it is started with --trace (downpour run, downpour submit)"
