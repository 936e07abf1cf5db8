"""How much can one coordinator take? Clients that connect at once, round trips, samples leased, and a restart.

A real coordinator with keys runs in a process of its own on this machine. Each figure is the median of ``--runs``.
`python benchmarks/control_plane.py --json FILE`
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_lib.documents import write_document
from downpour_common import messages as m
from downpour_common.keys import ClientKeys, load_pair, load_public
from downpour_common.transport.zeromq import ZmqClient
from downpour_common.wire import CONTROL_HEADER_LIMIT

DEADLINE_S = 60.0


class Coordinator:
    """A coordinator's process in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._command = [sys.executable, "-m", "downpour_deploy"]
        subprocess.run([*self._command, "keys", "new", "--dir", str(folder / "keys")], check=True, capture_output=True)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, again at the same port if it ran before."""
        data = ["--keys", str(self.folder / "keys"), "--data-dir", str(self.folder / "data")]
        address = ["coordinator", "start", "--bind", f"127.0.0.1:{self.port}"]
        self.process = subprocess.Popen(
            [*self._command, *address, *data], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.split(": ")[1].split(",")[0].rpartition(":")[2])

    def client(self) -> ZmqClient:
        """A user's connection."""
        keys = self.folder / "keys"
        return ZmqClient(
            CONTROL_HEADER_LIMIT, ClientKeys(load_pair(keys, "user"), {}, load_public(keys, "coordinator"))
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"tcp://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """``kill -9``."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def ask(client: ZmqClient, address: str, number: int, payload: bytes = b"", repeat_s: float = 2.0) -> None:
    """One ping and its answer, repeated while there is none."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        client.send(address, m.Ping(number, payload))
        again_s = time.monotonic() + repeat_s
        while time.monotonic() < again_s:
            if any(isinstance(a, m.Pong) and a.request == number for _, a in client.poll(0.05)):
                return
    raise TimeoutError(f"no answer within {DEADLINE_S:g} s")


def many_clients(coordinator: Coordinator, count: int) -> float:
    """Seconds until ``count`` clients that connect at once all have an answer."""
    clients = [coordinator.client() for _ in range(count)]
    started_s = time.perf_counter()
    try:
        for client in clients:
            client.send(coordinator.address, m.Ping(1, b""))
        for client in clients:
            while not client.poll(DEADLINE_S):
                raise TimeoutError("a client was not answered")
        return time.perf_counter() - started_s
    finally:
        for client in clients:
            client.close()


def round_trip(coordinator: Coordinator) -> float:
    """Seconds per ping, median of 500."""
    client = coordinator.client()
    try:
        times = []
        for number in range(500):
            started_s = time.perf_counter()
            ask(client, coordinator.address, number + 1)
            times.append(time.perf_counter() - started_s)
        return statistics.median(times)
    finally:
        client.close()


def restart(coordinator: Coordinator) -> float:
    """Seconds from ``kill -9`` to the first answer of a coordinator started again, for a connected client."""
    client = coordinator.client()
    try:
        ask(client, coordinator.address, 1)
        started_s = time.perf_counter()
        coordinator.kill()
        coordinator.start()
        ask(client, coordinator.address, 2, repeat_s=0.25)
        return time.perf_counter() - started_s
    finally:
        client.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    folder = Path(tempfile.mkdtemp(prefix="downpour-bench-"))
    coordinator = Coordinator(folder)
    rows: dict[str, Callable[[], float]] = {
        f"{options.clients} clients connect at once, all answered (s)": lambda: many_clients(
            coordinator, options.clients
        ),
        "round trip of a ping (s)": lambda: round_trip(coordinator),
        "kill -9, start, first answer (s)": lambda: restart(coordinator),
    }
    results: dict[str, list[float]] = {name: [] for name in rows}
    try:
        for _ in range(options.runs):
            for name, measure in rows.items():
                results[name].append(measure())
    finally:
        coordinator.kill()
        shutil.rmtree(folder, ignore_errors=True)
    for name, times in results.items():
        print(f"{name:<56} median {statistics.median(times):8.4f}  min {min(times):8.4f}  max {max(times):8.4f}")
    if options.json:
        document = {"runs": options.runs, "cores": os.cpu_count(), "results": results}
        write_document(Path(options.json), document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
