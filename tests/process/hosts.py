"""A cluster over several hosts on one machine: each host is a network namespace, wired to a bridge in a namespace of
its own. The machine's own network is neither used nor changed.

::

    coordinator 10.77.1.1   s1 .11   s2 .12   w1 .21   w2 .22   w3 .23   client .31
         └──────────────────┴────────┴── bridge ┴────────┴────────┴──────────┘

Needs the right to make network namespaces; :func:`missing` says why it cannot be had.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cluster_kit import Cluster

ADDRESSES = {
    "coordinator": "10.77.1.1",
    "s1": "10.77.1.11",
    "s2": "10.77.1.12",
    "w1": "10.77.1.21",
    "w2": "10.77.1.22",
    "w3": "10.77.1.23",
    "client": "10.77.1.31",
}
PORT = 7070
_CLONE_NEWNET = 0x40000000

Found = TypeVar("Found")


@functools.cache
def missing() -> str:
    """Why there can be no network namespaces here, or ""."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs ip (iproute2), to make network namespaces"
    name = f"dptest-{uuid.uuid4().hex[:6]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"needs network namespaces: {tried.stderr.strip()}"
    try:
        wire = ["ip", "-n", name, "link", "add", "veth-a", "type", "veth", "peer", "name", "veth-b"]
        tried = subprocess.run(wire, capture_output=True, text=True, check=False)
    finally:
        _ip("netns", "del", name)
    return f"needs veth: {tried.stderr.strip()}" if tried.returncode else ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts(Cluster):
    """A :class:`Cluster` whose daemons run on the hosts of :data:`ADDRESSES`, named as the agents are."""

    def __init__(self, folder: Path, node_timeout_s: float = 3.0) -> None:
        super().__init__(folder, True, node_timeout_s)
        self._prefix = f"dp{uuid.uuid4().hex[:6]}"
        self._made: list[str] = []
        try:
            self._wire()
        except BaseException:
            self.close()
            raise

    def _wire(self) -> None:
        bridge = self._space("bridge")
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for host, address in ADDRESSES.items():
            space = self._space(host)
            _ip("-n", bridge, "link", "add", f"v-{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", bridge, "link", "set", f"v-{host}", "master", "br0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _space(self, host: str) -> str:
        name = f"{self._prefix}-{host}"
        self._made.append(name)
        _ip("netns", "add", name)
        return name

    def command_at(self, host: str, command: Sequence[str]) -> list[str]:
        """``ip netns exec`` becomes the command, so that the process' id is the command's; "" is this machine."""
        return list(command) if not host else ["ip", "netns", "exec", f"{self._prefix}-{host}", *command]

    def inside(self, host: str, work: Callable[[], Found]) -> Found:
        """Do it in a thread that has gone to the host's network; what it starts there stays there."""
        results: list[Found] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with open(f"/var/run/netns/{self._prefix}-{host}", "rb") as space:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(space.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"at-{host}")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def bind(self) -> str:
        """Where the coordinator listens."""
        return f"{ADDRESSES['coordinator']}:{PORT}"

    def cut(self, host: str) -> None:
        """Nothing comes to this host or from it any more."""
        _ip("-n", f"{self._prefix}-bridge", "link", "set", f"v-{host}", "down")

    def mend(self, host: str) -> None:
        """The inverse of :meth:`cut`."""
        _ip("-n", f"{self._prefix}-bridge", "link", "set", f"v-{host}", "up")

    def close(self) -> None:
        """As :class:`Cluster`; then the namespaces go, and with them their links."""
        try:
            super().close()
        finally:
            made, self._made = self._made, []
            for name in reversed(made):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
