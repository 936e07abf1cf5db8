"""What a user means by RUN: a URL, a folder, or a job of a cluster."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from downpour.jobs.client import ClusterClient
from downpour_common.errors import CheckpointError, ConfigError
from downpour_coordinator.checkpoints import Checkpoint, load
from downpour_coordinator.sources import FolderSource, Source, fetch
from downpour_coordinator.urls import UrlStore, check_url, is_url
from downpour_deploy import running
from downpour_deploy.checkpoint.job import JobSource
from downpour_deploy.jobs.named import cluster_of


@contextmanager
def opened(name: str, join: str | None, keys: str | None, security: str | None, timeout_s: float) -> Iterator[Source]:
    """The checkpoints at ``name``. Raises :class:`ConfigError` where there is no such thing, and what clients raise."""
    if is_url(name):
        check_url(name)
        yield UrlStore(name)
    elif os.path.isdir(name):
        yield FolderSource(name)
    else:
        with cluster_of(name, join, keys, security, timeout_s) as client:
            yield JobSource(client, name)


@contextmanager
def asked(
    name: str, join: str | None, keys: str | None, security: str | None, timeout_s: float
) -> Iterator[tuple[ClusterClient, str]]:
    """Whom to ask for a checkpoint of ``name``, and the job's name there. Raises as :func:`opened`."""
    if is_url(name):
        raise ConfigError(f"{name}: give the run directory or the job, not where its checkpoints are copied to")
    if os.path.isdir(name):
        found = running.read(name)
        if found is None:
            raise ConfigError(f"{name}: no job of `downpour run` is under way there")
        with ClusterClient(found.address, security="none", timeout_s=timeout_s) as client:
            yield client, found.job
    else:
        with cluster_of(name, join, keys, security, timeout_s) as client:
            yield client, name


def chosen(source: Source, number: int | None) -> list[int]:
    """All of the source's checkpoints, or the one that was asked for. Raises :class:`ConfigError` without it."""
    numbers = source.numbers()
    if number is None:
        return numbers
    if number not in numbers:
        there = ", ".join(map(str, numbers)) or "none"
        raise ConfigError(f"{source.place} has no checkpoint {number}; there: {there}")
    return [number]


@contextmanager
def sound_one(
    source: Source, number: int | None, near: str, say: Callable[[str], None]
) -> Iterator[tuple[int, Checkpoint]]:
    """The newest sound checkpoint (or ``number``) in a folder of this machine: where it lies, else fetched below
    ``near`` for as long as it is needed. What is skipped is said. Raises :class:`CheckpointError` without one."""
    temporary = ""
    try:
        for each in reversed(chosen(source, number)):
            try:
                if isinstance(source, FolderSource):
                    checkpoint = load(source.where(each, ""))
                else:
                    temporary = temporary or tempfile.mkdtemp(prefix=".downpour-", dir=near)
                    checkpoint = load(fetch(source, each, temporary))
            except CheckpointError as error:
                say(f"skipped a damaged checkpoint: {error}")
                continue
            yield each, checkpoint
            return
        raise CheckpointError(source.place, "there is no sound checkpoint")
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
