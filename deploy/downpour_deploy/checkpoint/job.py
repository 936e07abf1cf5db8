"""The checkpoints of a job of a cluster, read through its coordinator."""

from __future__ import annotations

from collections.abc import Iterator

from downpour.jobs.client import ClusterClient
from downpour.jobs.download import read
from downpour.jobs.status import job_status
from downpour_coordinator.sources import MANIFEST, number_of


class JobSource:
    """A :class:`downpour_coordinator.sources.Source`. ``job``: id, beginning of one, or name."""

    def __init__(self, client: ClusterClient, job: str) -> None:
        self._client = client
        self._job = job_status(client.describe(job)).id
        self.place = f"job {self._job}"
        self._sizes = dict(client.files(self._job))

    def numbers(self) -> list[int]:
        """See :class:`Source`."""
        folders = [path.split("/") for path in self._sizes]
        found = [
            number_of(parts[1]) for parts in folders if len(parts) == 3 and parts[::2] == ["checkpoints", MANIFEST]
        ]
        return sorted(n for n in found if n is not None)

    def where(self, number: int, name: str) -> str:
        """See :class:`Source`."""
        folder = f"{self._job}: checkpoints/{number:06d}"
        return f"{folder}/{name}" if name else folder

    def read(self, number: int, name: str) -> Iterator[bytes]:
        """See :class:`Source`."""
        path = f"checkpoints/{number:06d}/{name}"
        if path not in self._sizes:
            raise FileNotFoundError(path)
        return read(self._client, self._job, path, self._sizes[path])

    def written_s(self, number: int) -> float | None:  # noqa: ARG002
        """Only the manifest itself tells."""
        return None
