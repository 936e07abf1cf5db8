"""What a launcher tells a worker process, through one environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from downpour_common.errors import ConfigError
from downpour_common.keys import ClientKeys, KeyPair
from downpour_common.modes import Mode, parse_mode

VARIABLE = "DOWNPOUR_WORKER"


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The job as one of its workers sees it. Times in seconds, sizes in bytes."""

    job: str
    slot: int
    worker_epoch: int
    workers: int
    shards: int
    coordinator: str
    mode: str
    device: Literal["auto", "cpu", "cuda"]
    seed: int
    buffers: str
    n_push: int
    n_fetch: int
    chunk_bytes: int
    window_bytes: int
    shared_memory: bool
    timeout_s: float
    start_timeout_s: float
    keys: dict[str, Any] | None = None
    """``coordinator``: its public key; ``job``: [public, secret] of the job; ``shards``: the public key of its shards.
    None: no encryption, and nobody proves who it is"""
    overlap: Literal["auto", "off"] = "auto"
    """``auto``: where gradients are sent, they leave while backward computes others"""
    push_dtype: Literal["same", "bfloat16"] = "same"
    """see :func:`downpour_common.dtypes.pushed_as`"""
    fetch_ahead: bool = False
    """the answer to a push is fetched while the next step computes"""
    in_place: bool = True
    """with ``shared_memory``: the servers may keep their weights in this worker's memory while it is the only one"""
    on_nan: str = "fail"
    """``fail``: a gradient with NaN or Inf is an error of the script; else the servers leave it out"""

    @property
    def parsed_mode(self) -> Mode:
        """``mode``, parsed."""
        return parse_mode(self.mode)

    @property
    def is_chief(self) -> bool:
        """Whether this is the chief of a job that nobody has left; see :attr:`downpour.session.Session.is_chief`."""
        return self.slot == 0

    def transport_keys(self) -> ClientKeys | None:
        """For the sockets to the coordinator and to the shards. Raises :class:`ConfigError`."""
        if self.keys is None:
            return None
        try:
            servers = {self.coordinator: self.keys["coordinator"]}
            return ClientKeys(KeyPair(*self.keys["job"]), servers, self.keys["shards"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{VARIABLE}: unusable keys ({type(error).__name__})") from None

    def to_environment(self) -> dict[str, str]:
        """The variables to start the worker's process with."""
        return {VARIABLE: json.dumps(asdict(self))}


def from_environment(environment: Mapping[str, str] = os.environ) -> WorkerContext | None:
    """The context, or None where no launcher is. Raises :class:`ConfigError` when it cannot be understood."""
    text = environment.get(VARIABLE)
    if not text:
        return None
    try:
        return WorkerContext(**cast(dict[str, object], json.loads(text)))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{VARIABLE} was not set by this version of downpour: {error}") from None
