"""What a launcher tells a shard process, through one environment variable. Free of torch, for launchers to import."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

VARIABLE = "DOWNPOUR_SHARD"
"""Unlike a process' arguments, its environment cannot be read by other users."""


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """All that a shard process is told when it is started."""

    job: str
    shard: int
    shard_epoch: int
    coordinator: str
    endpoint: str
    workers: int
    shards: int
    mode: str
    chunk_bytes: int
    timeout_s: float
    start_timeout_s: float

    def to_environment(self) -> dict[str, str]:
        """The variables to start the shard's process with."""
        return {VARIABLE: json.dumps(asdict(self))}
