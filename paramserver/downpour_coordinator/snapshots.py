"""A snapshot of the whole job: one answer of every shard makes a manifest, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m


@dataclass(frozen=True, slots=True)
class CommitSnapshot:
    """Effect: all files are on disk; write ``manifest`` into ``folder``, which makes the checkpoint count."""

    number: int
    folder: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SnapshotFailed:
    """Effect: there will be no checkpoint in ``folder``."""

    number: int
    folder: str
    reason: str


@dataclass(slots=True)
class Round:
    """Collects the shards' answers to one request."""

    number: int
    folder: str
    shards: int
    manifest: dict[str, Any]
    at_clock: int
    _files: dict[int, dict[str, Any]] = field(default_factory=dict)
    _errors: dict[int, str] = field(default_factory=dict)

    def taken(self, message: m.SnapshotTaken) -> CommitSnapshot | SnapshotFailed | None:
        """One shard's answer; the outcome once all have answered."""
        if message.snapshot != self.number or not 0 <= message.shard < self.shards:
            return None
        if message.error:
            self._errors[message.shard] = message.error
        else:
            self._files[message.shard] = message.document
        if len(self._files) + len(self._errors) < self.shards:
            return None
        if self._errors:
            reason = "; ".join(f"server/{shard}: {error}" for shard, error in sorted(self._errors.items()))
            return SnapshotFailed(self.number, self.folder, reason)
        return self._complete()

    def missing(self) -> list[int]:
        """The shards that have not answered, ascending."""
        return [i for i in range(self.shards) if i not in self._files and i not in self._errors]

    def _complete(self) -> CommitSnapshot | SnapshotFailed:
        files = [self._files[shard] for shard in sorted(self._files)]
        manifest = {**self.manifest, "files": files}
        if self.manifest["synchronous"]:
            clocks = {clock for f in files for clock in f["trainable_versions"]}
            if len(clocks) > 1:
                reason = f"the chunks are in different rounds ({min(clocks)} to {max(clocks)})"
                return SnapshotFailed(self.number, self.folder, reason)
            if clocks:
                manifest["clock"] = clocks.pop()
            position = max((tuple(f["position"]) for f in files), default=())
            if len(position) == 2:
                manifest["data"] = {"epoch": position[0], "done": [[0, position[1]]] if position[1] else []}
        return CommitSnapshot(self.number, self.folder, manifest)
