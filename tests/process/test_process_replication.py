"""SIGKILL to leaders and backups of jobs whose shards have two processes each."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cluster_kit import SCRIPTS, Cluster
from safetensors.torch import load_file

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]


def test_killed_leaders_and_a_killed_backup_cost_no_push_and_no_restart(box: Box) -> None:
    steps = 150
    options = ("-w", "2", "-s", "2", "--replication", "2", "--json")
    chaos = ("--chaos", "kill:leader/0@step:20,kill:backup/1@step:40")
    ended = box.run(*options, *chaos, "ledger.py", "--slow", "--steps", str(steps))
    assert ended.code == 0, ended.text
    document = ended.document
    assert (document["state"], document["restarts"], document["lost_pushes"]) == ("SUCCEEDED", 0, 0), ended.text
    assert document["warnings"] == [
        "server/0 killed by signal 9 (SIGKILL); server/0b leads now",
        "server/1b killed by signal 9 (SIGKILL); another one is started",
    ]
    assert ended.tensors()["weight"].flatten().tolist() == [2.0 * steps] * 9
    assert ended.text.count("starts at clock") == 2, "no worker was started again"


def test_in_sync_a_killed_leader_changes_no_bit(box: Box) -> None:
    options = ("-w", "2", "--mode", "sync", "--threads", "1", "--json")
    plain = box.start(*options, "survivor.py", "8", out="plain")
    chaos = ("--chaos", "kill:leader/0@step:20")
    killed = box.start(*options, "--replication", "2", *chaos, "survivor.py", "8", out="killed")
    ended, reference = killed.end(), plain.end()
    assert (reference.code, ended.code) == (0, 0), ended.text
    assert ended.document["warnings"] == ["server/0 killed by signal 9 (SIGKILL); server/0b leads now"]
    assert ended.document["restarts"] == 0
    expected = (reference.out / "model.safetensors").read_bytes()
    assert (ended.out / "model.safetensors").read_bytes() == expected


def test_in_a_cluster_the_coordinator_is_killed_with_a_leader_and_a_host_is_lost(tmp_path: Path) -> None:
    steps = 500
    folder = tmp_path / "code"
    folder.mkdir()
    script = Path(shutil.copy(SCRIPTS / "ledger.py", folder))
    with Cluster(tmp_path) as cluster:
        cluster.start_coordinator("--no-fsync")
        cluster.start_agents({"s1": ("server",), "s2": ("server",), "w1": ("worker", "--slots", "2")})
        job = cluster.submit(script, "--slow", "--steps", steps, workers=2, shards=1, replication=2)
        document = cluster.running(job, 10)
        parts = {p["name"]: (p["node"], p["part"]) for p in document["processes"] if p["role"] == "server"}
        assert sorted(parts) == ["server/0", "server/0b"]
        assert {node for node, _ in parts.values()} == {"s1", "s2"}
        os.kill(cluster.processes(job)["server/0"], signal.SIGKILL)
        assert cluster.coordinator is not None
        cluster.coordinator.kill()
        cluster.start_coordinator("--no-fsync")
        cluster.wait(job, lambda d: "server/0b leads now" in str(d["warnings"]) and not d["degraded"], "a backup")
        cluster.agents[parts["server/0b"][0]].kill()
        document = cluster.ended(job)
        assert (document["restarts"], document["lost_pushes"]) == (0, 0), document["warnings"]
        first, second = [text for text in document["warnings"] if "leads now" in text]
        assert first == "server/0 killed by signal 9 (SIGKILL); server/0b leads now"
        assert second.startswith("server/0b lost with its host")
        cluster.show()
        weights = load_file(cluster.files(job) / "model.safetensors")["weight"]
        assert weights.flatten().tolist() == [2.0 * steps] * 9
