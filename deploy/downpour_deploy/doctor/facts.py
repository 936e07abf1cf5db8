"""What the checks look at: plain values, gathered elsewhere. Sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file of the folder of keys. ``mode``: permission bits."""

    name: str
    mode: int


@dataclass(frozen=True, slots=True)
class KeysFacts:
    """The keys to come with. ``folder`` is None when none was given."""

    folder: str | None
    declined: bool
    """``--security none``"""
    local: bool
    """the coordinator's address is this host's own, so that keys are not asked for"""
    own: str = ""
    """the key file that is presented, such as ``server.key``"""
    exists: bool = True
    mode: int = 0o700
    """permission bits of the folder"""
    files: tuple[KeyFile, ...] = ()
    problem: str = ""
    """why the keys cannot be used; "" when they can"""


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface and its first IPv4 address."""

    name: str
    address: str
    prefix: int


@dataclass(frozen=True, slots=True)
class WayFacts:
    """The way to the coordinator at ``host``:``port``."""

    host: str
    port: int
    addresses: tuple[str, ...] = ()
    """IPv4 addresses of the name"""
    resolve_error: str = ""
    only_ipv6: bool = False
    connect_error: str = ""
    """why no connection came about; "" when one did"""
    mechanism: str = ""
    """what the listener said of itself: ``CURVE``, ``NULL``, …; "" when it does not speak ZeroMQ's protocol"""
    silent: bool = False
    """it accepts connections and then says nothing"""
    source: str = ""
    """this host's address on the route; "" without a route"""
    interface: Interface | None = None
    """the interface with that address"""
    in_container: bool = False
    bind_error: str = ""
    """why a port cannot be bound on ``source``"""
    ports: tuple[int, int] = (0, 0)
    """first and last of the ports that the system gives out"""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Payload that went to the coordinator and back again."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The conversation with the coordinator. ``outcome``: ``answered``, or why not: ``refused``, ``wrong-server-key``,
    ``unreachable``, ``silent``, ``forbidden``; ``not-tried`` when there is nobody to talk to or no key to come with."""

    outcome: str
    facts: dict[str, Any] = field(default_factory=dict)
    """what the coordinator says of itself"""
    round_trips_s: tuple[float, ...] = ()
    clock_ahead_s: float = 0.0
    """the coordinator's wall clock less this host's, at best"""
    clock_error_s: float = 0.0
    """by which that may be wrong"""
    throughput: Throughput | None = None
    nodes: tuple[dict[str, Any], ...] | None = None
    """node documents; None when the key does not allow to ask"""


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What an interpreter of its own found. ``error``: last line of what it complained about."""

    error: str = ""
    version: str = ""
    cuda: str = ""
    """CUDA version of the build; "" for a build without"""
    devices: int = 0
    """GPUs that torch can use"""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """The file system that ``path`` is, or would be, on."""

    path: str
    free_bytes: int
    writable: bool


@dataclass(frozen=True, slots=True)
class HostFacts:
    """This host, as far as this process may use it."""

    python: str
    version: str
    """of downpour"""
    cores: int
    host_cores: int
    """of the host, whatever this process may use of it"""
    memory_bytes: int
    host_memory_bytes: int
    gpus: int
    omp_threads: str
    """``OMP_NUM_THREADS``; "" when it is not set"""
    files_soft: int
    files_hard: int
    """limits of open files; -1: none"""
    shm_bytes: int
    """size of ``/dev/shm``; -1: it is not there"""
    shared_memory_error: str
    """why processes of this user cannot share memory; "" when they can"""
    torch: TorchFacts
    disks: tuple[DiskFacts, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything. ``way`` and ``cluster`` are None when no coordinator was named."""

    role: str
    """``user``, ``server`` or ``worker``: what this host is to be"""
    keys: KeysFacts | None
    way: WayFacts | None
    cluster: ClusterFacts | None
    host: HostFacts
