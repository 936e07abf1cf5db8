"""What a launcher tells a worker process, through one environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from downpour_common.errors import ConfigError
from downpour_common.keys import ClientKeys, KeyPair
from downpour_common.modes import Mode, parse_mode
from downpour_common.replicas import Schedule, chosen_microbatches

if TYPE_CHECKING:
    from downpour.parallel.group import Place

VARIABLE = "DOWNPOUR_WORKER"
Autocast = Literal["off", "bfloat16", "float16"]


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
    autocast: Autocast = "off"
    """see :mod:`downpour.precision`"""
    activation_checkpointing: bool = False
    """see :mod:`downpour.activations`"""
    trace: bool = False
    """spans are recorded, see :mod:`downpour.spans`"""
    fetch: Literal["whole", "layers"] = "whole"
    """``layers``: see :mod:`downpour.layerwise`"""
    memory: int = 0
    """with it: bytes of weights and gradients held at most; 0: chosen"""
    widths: tuple[int, ...] = (1,)
    """ranks of each pipeline stage of a replica"""
    schedule: Schedule = "1f1b"
    microbatches: int = 0
    """parts of a batch; 0: chosen, see :attr:`parts`"""
    interleave: int = 2
    """schedule ``interleaved``: stages of each rank"""
    rule: str = ""
    """``module:Class`` of an update rule of the job's own"""
    compress: str = ""
    """codecs of what travels"""
    warm_start: int = 0
    """steps that worker 0 takes alone before the others begin"""
    clip: float = 0.0
    """largest norm of a gradient; 0: any"""
    inject_staleness: int = 0
    """steps that each gradient is held back"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON has lists

    @property
    def parsed_mode(self) -> Mode:
        """``mode``, parsed."""
        return parse_mode(self.mode)

    @property
    def ranks(self) -> int:
        """Workers of a replica."""
        return sum(self.widths)

    @property
    def rank(self) -> int:
        """This worker's number in its replica."""
        return self.slot % self.ranks

    @property
    def replica(self) -> int:
        """The number of this worker's replica."""
        return self.slot // self.ranks

    @property
    def parts(self) -> int:
        """Parts that a batch is computed in."""
        return chosen_microbatches(self.microbatches, len(self.widths))

    @property
    def place(self) -> Place:
        """Where this worker stands in its replica."""
        from downpour.parallel.group import Place

        return Place(self.rank, self.widths)

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
