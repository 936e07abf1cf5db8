"""What a launcher tells a shard process, through one environment variable. Free of torch, for launchers to import."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from downpour_common.compensation import SPARE_BASES
from downpour_common.errors import ConfigError
from downpour_common.keys import ClientKeys, KeyPair, ServerKeys

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
    folder: str = ""
    """the job's folder on this host; relative folders in messages are below it"""
    upload: bool = False
    """send snapshots to the coordinator's host instead of keeping them here"""
    push_dtype: str = "same"
    """see :func:`downpour_common.dtypes.pushed_as`"""
    keep_previous: bool = False
    """sync: keep each chunk's weights of the round before, from which a worker that was lost can be replaced"""
    skip_non_finite: bool = False
    """leave contributions with NaN or Inf out instead of refusing them"""
    follows: bool = False
    """it starts as a follower: it holds nothing until it is told whom to follow, and serves nobody until promoted"""
    term: int = -1
    """of the shard's leadership, which is its epoch on the data plane; -1: ``shard_epoch``"""
    process: int = -1
    """index among the job's server processes, which is its index on the control plane; -1: ``shard``"""
    rule: str = ""
    """``module:Class`` of an update rule of the job's own; ``script_folder`` is where its module is"""
    script_folder: str = ""
    compress: str = ""
    """codecs of what travels"""
    compensation: str = "off"
    """what is done about staleness"""
    bases: int = SPARE_BASES
    """where that needs them: weights kept for each worker at most"""
    warm_start: int = 0
    """clock of the job until which worker 0 is alone"""
    measure_noise: bool = True
    """contributions are gradients, whose noise is to be estimated"""
    keys: dict[str, Any] | None = None
    """``coordinator``: its public key; ``job``: [public, secret] of the job, which also all its workers have;
    ``shards``, ``shard_secret``: the shards' own. None: no encryption, and nobody proves who it is"""

    @property
    def index(self) -> int:
        """Who it is to the coordinator."""
        return self.shard if self.process < 0 else self.process

    @property
    def first_term(self) -> int:
        """The term in which it starts, if it leads."""
        return self.shard_epoch if self.term < 0 else self.term

    def path(self, folder: str) -> str:
        """Where a folder that the coordinator names is on this host."""
        return os.path.join(self.folder, folder)

    def transport_keys(self) -> tuple[ServerKeys, ClientKeys] | tuple[None, None]:
        """For the data socket, which lets in the job's workers only, and for the socket to the coordinator.

        Raises :class:`ConfigError`.
        """
        if self.keys is None:
            return None, None
        try:
            keys = self.keys
            job, shards = KeyPair(*keys["job"]), KeyPair(keys["shards"], keys["shard_secret"])
            return ServerKeys(shards, {job.public: "worker"}), ClientKeys(job, {}, keys["coordinator"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{VARIABLE}: unusable keys ({type(error).__name__})") from None

    def follower_keys(self) -> ClientKeys | None:
        """For a follower's socket to its leader's data socket, which lets in whoever has the job's key.

        Raises :class:`ConfigError`.
        """
        server, client = self.transport_keys()
        return None if server is None or client is None else ClientKeys(client.pair, {}, server.pair.public)

    def to_environment(self) -> dict[str, str]:
        """The variables to start the shard's process with."""
        return {VARIABLE: json.dumps(asdict(self))}
