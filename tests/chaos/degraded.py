"""Degraded, not dead: frozen processes, a disk that refuses, links that are cut or slow. Minutes long, so
not among the tests of every change: `python -m pytest tests/chaos/degraded.py`; part of `make chaos`.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hosts as network
import killloop
import oracles
import pytest
from hosts import Hosts
from schedules import STEPS, Fault, Schedule

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

SYNC = Schedule(0, "sync", 2, 2, False, 0.5, "tcp", ())
ASYNC = replace(SYNC, kind="async")
FROZEN_S = 22.0
"""Longer than it takes for a process to be missed, and for a status line to be due."""


def run(schedule: Schedule, folder: Path, failpoints: str = "", *options: str) -> tuple[dict[str, Any], str]:
    """The document and stderr of a run that ends well; ``options`` are the script's."""
    code = killloop.run_command([*killloop.command_of(schedule, folder), *options], folder, failpoints)
    said = (folder / "stderr").read_text()
    assert code == 0, said
    return json.loads((folder / "stdout").read_text()), said


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the synchronous run without faults."""
    folder = tmp_path_factory.mktemp("plain")
    run(SYNC, folder)
    return oracles.digest_of(folder / "out")


# ---------------------------------------------------------------- frozen processes


@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_frozen_process_is_named_waited_for_and_changes_no_bit(tmp_path: Path, digest: str, role: str) -> None:
    schedule = replace(SYNC, faults=(Fault(0.5, "stop", role, 1, FROZEN_S),))
    _, said = run(schedule, tmp_path)
    assert re.search(rf"DEGRADED: .*{role}/1 has not been heard of", said), said
    assert f"chaos: {role}/1 goes on" in said
    assert oracles.digest_of(tmp_path / "out") == digest


def test_in_async_the_others_go_on_while_one_is_frozen(tmp_path: Path) -> None:
    schedule = replace(ASYNC, faults=(Fault(0.3, "stop", "worker", 1, FROZEN_S),))
    _, said = run(schedule, tmp_path)
    assert re.search(r"DEGRADED: .*worker/1 has not been heard of", said), said
    assert said.index("slot 0 has made its last push") < said.index("worker/1 goes on")
    ledger = oracles.ledger_of(tmp_path / "out", tmp_path / "notes", 2, STEPS)
    assert ledger.wrong() == []
    assert [len(lost) for lost in ledger.lost()] == [0, 0]


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize(
    "point",
    [
        "file.write.before[server]=error:ENOSPC@1",
        "file.write.after[server]=error:EIO@1",
        "file.rename.before[server]=error:EIO@1",
        "file.rename.after[server/0]=error:EIO@1",
        "coordinator.commit.before=error:ENOSPC@1",
        "coordinator.commit.after=error:EIO@1",
        "shard.snapshot.before[server/1]=error:ENOSPC@1",
        "shard.snapshot.after[server/1]=error:EIO@1",
    ],
)
def test_a_disk_that_refuses_once_costs_a_checkpoint_and_no_more(tmp_path: Path, digest: str, point: str) -> None:
    schedule = replace(SYNC, faults=(Fault(3.0, "kill", "server", 0),))
    run(schedule, tmp_path, point, "--pause-ms", "30")  # the last checkpoint is not the first
    assert oracles.digest_of(tmp_path / "out") == digest


# ---------------------------------------------------------------- links


needs_hosts = pytest.mark.skipif(bool(network.missing()), reason=network.missing() or "-")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts for shards, two for workers."""
    with Hosts(tmp_path_factory.mktemp("hosts"), 3.0) as made:
        made.start_coordinator()
        made.start_agents({"s1": ("server",), "s2": ("server",), "w1": ("worker",), "w2": ("worker",)})
        yield made
        made.show()


def submit(cluster: Hosts, oracle: str, folder: Path) -> str:
    """One of the workloads in the cluster, each process on a host of its own."""
    schedule = SYNC if oracle == "bitwise" else ASYNC
    script = killloop.script_of(schedule, folder)
    job = cluster.submit(
        killloop.HERE / "workloads" / script[0],
        *script[1:],
        workers=2,
        shards=2,
        mode="sync" if oracle == "bitwise" else "async",
        restarts=20,
        settings={"checkpoint_s": 0.5, "timeout_s": 60},
    )
    cluster.running(job, 20)
    return job


def throttle(cluster: Hosts, host: str, kbit: int) -> None:
    """Let this host send so much per second; 0: all it can."""
    device = ["tc", "qdisc"]
    shape = ["root", "tbf", "rate", f"{kbit}kbit", "burst", "4kb", "latency", "400ms"] if kbit else ["root"]
    command = [*device, "add" if kbit else "del", "dev", "eth0", *shape]
    subprocess.run(cluster.command_at(host, command), check=True, capture_output=True)


@needs_hosts
@pytest.mark.parametrize("host", ["s1", "w2", "coordinator"])
@pytest.mark.parametrize("cut_s", [1.5, 8.0], ids=["short", "given-up"])
def test_a_cut_link_changes_no_bit(cluster: Hosts, tmp_path: Path, digest: str, host: str, cut_s: float) -> None:
    """Longer than the node timeout, what was on the host is replaced; the frozen ones come back as zombies."""
    job = submit(cluster, "bitwise", tmp_path)
    cluster.cut(host)
    time.sleep(cut_s)
    cluster.mend(host)
    cluster.ended(job, timeout_s=120.0)
    assert oracles.digest_of(cluster.files(job)) == digest
    for node in ("s1", "s2", "w1", "w2"):
        cluster.until_node(node, "READY")


@needs_hosts
@pytest.mark.parametrize("host", ["s2", "w1"])
def test_a_cut_link_applies_no_push_twice(cluster: Hosts, tmp_path: Path, host: str) -> None:
    job = submit(cluster, "ledger", tmp_path)
    cluster.cut(host)
    time.sleep(8.0)
    cluster.mend(host)
    cluster.ended(job, timeout_s=120.0)
    assert oracles.ledger_of(cluster.files(job), tmp_path / "notes", 2, STEPS).wrong() == []
    for node in ("s1", "s2", "w1", "w2"):
        cluster.until_node(node, "READY")


@needs_hosts
def test_a_slow_link_is_slow_and_nothing_else(cluster: Hosts, tmp_path: Path, digest: str) -> None:
    job = submit(cluster, "bitwise", tmp_path)
    throttle(cluster, "s1", 100)
    try:
        document = cluster.ended(job, timeout_s=120.0)
    finally:
        throttle(cluster, "s1", 0)
    assert document["restarts"] == 0
    assert oracles.digest_of(cluster.files(job)) == digest
