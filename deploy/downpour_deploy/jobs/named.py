"""A name that a user gives for a folder of this machine or for a job of a cluster, once it is no folder."""

from __future__ import annotations

from downpour.jobs.client import ClusterClient
from downpour_common.errors import ConfigError


def cluster_of(name: str, join: str | None, keys: str | None, security: str | None, timeout_s: float) -> ClusterClient:
    """The cluster that may know ``name``. Raises :class:`ConfigError` where none is given, and what clients raise."""
    try:
        return ClusterClient(join, keys, security, timeout_s)
    except ConfigError as error:
        if not join and "/" in name:
            raise ConfigError(f"{name}: no such folder") from None
        raise ConfigError(f"{name}: no such folder here; for a job of a cluster:", *error.problems) from None
