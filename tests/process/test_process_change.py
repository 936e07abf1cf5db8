"""Running jobs are given another mode, and go on with it; what a script cannot do is taken back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cluster_kit import SCRIPTS, Cluster

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(180)]


def command(box: Box, *arguments: str) -> tuple[int, Any]:
    """``downpour set out … --json`` in the box's folder: exit code, and document or errors."""
    ended = subprocess.run(
        [sys.executable, "-m", "downpour_deploy", "set", "out", *arguments, "--json"],
        cwd=box.folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return ended.returncode, json.loads(ended.stdout) if ended.stdout else ended.stderr


def test_a_running_job_goes_on_in_another_mode(box: Box) -> None:
    running = box.start("-w", "2", "-s", "2", "--mode", "async", "ledger.py")
    running.wait_line("worker/0 is training")
    running.wait_line("worker/1 is training")
    code, text = command(box, "workers=3")
    assert code == 2, text
    assert "downpour scale" in text
    code, found = command(box, "mode=sync")
    assert (code, found["state"], found["mode"], found["error"]) == (0, "changed", "sync", "")
    code, found = command(box, "mode=sync;9=async")
    assert (code, found["state"], found["mode"]) == (1, "failed", "sync")
    assert "parameter group 9, which the optimizer does not have" in found["error"]
    running.interrupt()
    ended = running.end(60.0)
    assert ended.code == 130, ended.text
    assert 'mode = "sync"' in (box.folder / "out" / "job.toml").read_text()
    rows = [json.loads(line) for line in (box.folder / "out" / "metrics.jsonl").read_text().splitlines()]
    changes = [row["changed"]["mode"] for row in rows if "changed" in row]
    assert changes == [["async", "sync"], ["sync", "sync;9=async"], ["sync;9=async", "sync"]]


def test_a_clusters_job_goes_on_in_another_mode_though_the_coordinator_is_killed_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    script = Path(shutil.copy(SCRIPTS / "numbered.py", folder))
    with Cluster(tmp_path / "cluster") as cluster:
        cluster.start_coordinator("--no-fsync")
        cluster.start_agents({"s1": ("server",), "w1": ("worker", "--slots", "2")})
        options = {"workers": 2, "mode": "async", "name": "numbered"}
        endless = ("--steps", 1 << 30, "--until-go", "--slow", "0.02")
        job = cluster.submit(script, tmp_path / "notes", *endless, **options)
        cluster.wait(job, lambda d: d["state"] == "RUNNING" and d["clock"] > 5, "steps", 60.0)
        assert "cannot change" in cluster.cli("set", job, "name=other", code=2).stderr
        setting = cluster.begin("set", "numbered", "mode=ssp:2", "--json", "--answer-timeout", "60")
        cluster.wait(job, lambda d: d["state"] == "RESTARTING" and d["reason"] == "CHANGED", "a change", 60.0)
        cluster.coordinator.kill()
        cluster.coordinator.end()
        cluster.start_coordinator("--no-fsync")
        ended = setting.end(90.0)
        assert ended.code == 0, ended.text
        assert (ended.document["state"], ended.document["mode"]) == ("changed", "ssp:2")
        document = cluster.wait(job, lambda d: d["state"] == "RUNNING", "going on", 30.0)
        assert (document["mode"], document["restarts"], document["spec"]["mode"]) == ("ssp:2", 0, "ssp:2")
        (tmp_path / "notes" / "go").touch()
        assert cluster.ended(job, "SUCCEEDED")["result"]["staleness"]["max"] <= 2 * 2
