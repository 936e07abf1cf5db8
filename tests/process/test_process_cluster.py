"""A cluster on loopback, with keys, as its users see it: exit codes, the queue, scaling, restarts, resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_kit import SCRIPTS, Cluster, dead_port, until, weights

import downpour
from downpour_common.keys import ROLES, new_keys
from downpour_common.transport.zeromq import new_key_pair

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

AGENTS: dict[str, tuple[str, ...]] = {"s1": ("server",), "w1": ("worker", "--slots", "3", "--label", "zone=a")}
ENDLESS = 1 << 30
STEPS = 200
ID = r"numbered-[0-9a-f]{6}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One host for servers, one with room for three workers."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.start_coordinator("--no-fsync")
        made.start_agents(AGENTS)
        yield made


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The cluster; a test's jobs are over when the next begins, and its logs are shown when it fails."""
    yield running
    running.cancel_all()
    running.show()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """``numbered.py`` in a folder of its own."""
    folder = tmp_path / "code"
    folder.mkdir()
    return Path(shutil.copy(SCRIPTS / "numbered.py", folder))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where the script leaves its notes."""
    return tmp_path / "notes"


def reached(folder: Path, *ranks: int) -> None:
    """Wait until these ranks are at the gate."""
    until(lambda: all((folder / f"reached-{rank}").exists() for rank in ranks), f"ranks {ranks} at the gate")


def states(cluster: Cluster, *jobs: str) -> list[str]:
    """How the jobs stand."""
    return [cluster.describe(job)["state"] for job in jobs]


# ---------------------------------------------------------------- commands and their exit codes


def test_a_job_from_submit_to_get(cluster: Cluster, script: Path, notes: Path, tmp_path: Path) -> None:
    options = ["-w", "2", "--mode", "sync", "--threads", "1", "--set", "checkpoint_s=0"]
    ended = cluster.cli("submit", *options, str(script), str(notes), "--steps", "4")
    job = ended.stdout.strip()
    assert job.startswith("numbered-")
    assert f"job {job}: 2 workers, 1 shard, mode sync" in ended.stderr
    cluster.cli("wait", job, code=0)
    shown = cluster.cli("status", job).stdout
    assert f"{job}  SUCCEEDED" in shown
    assert "worker/1" in shown
    assert job in cluster.cli("list").stdout
    lines = cluster.cli("logs", f"{job}/worker/1").stdout.splitlines()
    assert lines == ["rank 1 begins at step 0", *(f"line {n} of rank 1" for n in range(1, 5)), "rank 1 is done"]
    assert "worker/0 line 4 of rank 0" in cluster.cli("logs", job).stdout
    assert cluster.cli("logs", "--tail", "1", f"{job}/worker/0").stdout == "rank 0 is done\n"
    out = tmp_path / "out"
    assert "files" in cluster.cli("get", job, "-o", str(out)).stdout
    assert {"model.safetensors", "metrics.jsonl", "job.toml", "logs"} <= {entry.name for entry in out.iterdir()}
    (out / "model.safetensors").write_bytes(b"mine")
    cluster.cli("get", job, "-o", str(out), code=74)
    nodes = cluster.cli("nodes").stdout
    assert "zone=a" in nodes
    assert "READY" in nodes


def test_a_crash_is_told_with_all_that_was_written(cluster: Cluster, script: Path, notes: Path) -> None:
    options = ["-w", "2", "--threads", "1", "--follow", str(script), str(notes), "--crash", "1,3"]
    ended = cluster.cli("submit", *options, code=100)
    assert "worker/1 on w1 failed: RuntimeError: the cat sat on the keyboard (exit code 1)" in ended.text
    job = cluster.ask(lambda client: client.jobs())[0]["job"]
    log = cluster.cli("logs", f"{job}/worker/1").stdout
    assert log.splitlines()[:4] == ["rank 1 begins at step 0", *(f"line {n} of rank 1" for n in range(1, 4))]
    assert log.splitlines()[4].startswith("an unterminated last line")
    status = cluster.cli("status", job).stdout
    assert "Traceback (most recent call last):" in status
    cluster.cli("wait", job, code=100)
    failed = cluster.cli("wait", "--json", job, code=100).document
    assert (failed["state"], failed["reason"], failed["failure"]["host"]) == ("FAILED", "SCRIPT_FAILED", "w1")
    cluster.cli("get", job, "-o", str(notes / "got"))
    assert not (notes / "got" / "model.safetensors").exists()


def test_the_last_line_of_a_process_that_was_killed_needs_no_end(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    script = folder / "killed.py"
    text = "import os, sys, signal\nsys.stdout.write('first\\nlast without end')\nsys.stdout.flush()\n"
    script.write_text(text + "os.kill(os.getpid(), signal.SIGKILL)\n")
    job = cluster.submit(script)
    document = cluster.ended(job, "FAILED")
    assert cluster.cli("logs", f"{job}/worker/0").stdout == "first\nlast without end\n"
    assert cluster.log(job, "worker-0") == "first\nlast without end"
    failure = document["failure"]
    assert (failure["reason"], failure["exit_code"]) == ("PROCESS_KILLED", 137)
    assert failure["message"] == "killed by signal 9 (SIGKILL)"
    assert failure["details"].splitlines() == ["first", "last without end"]


def test_a_remote_traceback_reaches_the_python_that_submitted(cluster: Cluster, script: Path, notes: Path) -> None:
    keys = cluster.keys_for("user", "client")
    job = downpour.submit(
        script, [notes, "--crash", "0,2"], join=cluster.address, keys=keys, threads=1, name="from-python"
    )
    with pytest.raises(downpour.JobFailed, match="worker/0 on w1 failed") as caught:
        job.result(timeout=60)
    error = caught.value
    assert (error.role, error.index, error.host, error.exit_code) == ("worker", 0, "w1", 1)
    assert 'raise RuntimeError("the cat sat on the keyboard")' in error.traceback
    assert "numbered.py" in error.traceback
    assert downpour.job("from-python", join=cluster.address, keys=keys).id == job.id


def test_waiting_and_cancelling(cluster: Cluster, script: Path, notes: Path) -> None:
    job = cluster.submit(script, notes, "--steps", ENDLESS, "--slow", 0.01)
    cluster.running(job)
    assert "has not ended within" in cluster.cli("wait", "--timeout", "0.2", job, code=101).stderr
    left = cluster.begin("wait", job)
    left.line(r"RUNNING|step \d+|worker")
    left.signal(signal.SIGINT)
    assert left.end().code == 101
    assert cluster.describe(job)["state"] == "RUNNING"
    assert f"job {job}: CANCELLED" in cluster.cli("cancel", job).stderr
    cluster.cli("wait", job, code=103)
    assert "has ended: CANCELLED" in cluster.cli("cancel", job).stderr
    assert not cluster.processes(job)


def test_what_cannot_work_is_said_with_its_exit_code(cluster: Cluster, script: Path, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{dead_port()}"
    assert f"nothing listens at {nowhere}" in cluster.cli("list", "--join", nowhere, "--timeout", "1", code=69).stderr
    new_keys(tmp_path / "strange", {role: new_key_pair() for role in ROLES})
    shutil.copy(Path(cluster.keys_for("user", "client")) / "coordinator.pub", tmp_path / "strange")
    refused = cluster.cli("list", "--keys", str(tmp_path / "strange"), code=77)
    assert "does not accept the key" in refused.stderr
    assert "asks for a key" in cluster.cli("list", "--security", "none", code=77).stderr
    bad = tmp_path / "job.toml"
    bad.write_text('script = "code/numbered.py"\nworkers = 0\nshrads = 2\n')
    problems = cluster.cli("submit", str(bad), code=78).stderr
    assert "did you mean shards?" in problems
    assert "workers" in problems
    assert "there is no job nobody" in cluster.cli("status", "nobody", code=2).stderr
    cluster.cli("submit", "-w", "0", str(script), code=2)
    cluster.cli("logs", "nobody/worker/0", code=2)
    cluster.cli("drain", "nobody", code=2)


def test_a_dry_run_tells_and_does_nothing(cluster: Cluster, script: Path, notes: Path) -> None:
    before = cluster.ask(lambda client: client.jobs())
    options = ["--dry-run", "-w", "3", "-s", "2", "--worker-label", "zone=a"]
    document = cluster.cli("submit", *options, "--json", str(script), str(notes)).document
    assert (document["dry_run"], document["fits"]) == (True, True)
    assert {(p["role"], p["index"], p["node"]) for p in document["placement"]} == {
        *(("worker", i, "w1") for i in range(3)),
        *(("server", i, "s1") for i in range(2)),
    }
    assert [path for path, _ in document["bundle"]["files"]] == ["numbered.py"]
    assert "would start now" in cluster.cli("submit", *options, str(script), str(notes)).stdout
    assert cluster.ask(lambda client: client.jobs()) == before


def test_names_of_jobs_are_completed(cluster: Cluster, script: Path, notes: Path) -> None:
    job = cluster.submit(script, notes, "--steps", 1, name="complete-me")
    command = Path(sys.executable).parent / "downpour"
    words = f"downpour status --join {cluster.address} --keys {cluster.keys_for('user', 'client')} complete-"
    asked = {"_DOWNPOUR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "6"}

    def complete() -> list[str]:
        ended = subprocess.run([command], env=cluster.environment(**asked), capture_output=True, text=True, check=False)
        assert ended.stderr == ""
        return ended.stdout.split()

    # A completion gives up silently when the coordinator takes longer than half a second, as it may on a busy machine.
    assert set(until(complete, "completion")) == {job, "complete-me"}
    cluster.ended(job)


# ---------------------------------------------------------------- the queue


def test_jobs_wait_for_their_turn(cluster: Cluster, script: Path, notes: Path) -> None:
    first = cluster.submit(script, notes / "1", "--steps", 8, "--gate", 4, workers=2)
    reached(notes / "1", 0, 1)
    second = cluster.submit(script, notes / "2", "--steps", 4, workers=2)
    third = cluster.submit(script, notes / "3", "--steps", 4, workers=1)
    waiting = cluster.wait(second, lambda d: d["message"], "reason to wait")
    assert (waiting["state"], waiting["reason"], waiting["position"]) == ("PENDING", "QUEUED", 1)
    assert "1 of 2 worker slots are missing" in waiting["message"]
    behind = cluster.wait(third, lambda d: d["message"], "reason to wait")
    assert (behind["position"], second in behind["message"]) == (2, True)  # though there is room for it: no overtaking
    assert "in the queue, position 1" in cluster.cli("list").stdout
    refused = cluster.cli("submit", "-w", "4", str(script), str(notes), code=2)
    assert "too small for this job" in refused.stderr
    assert "--anyway" in refused.stderr
    large = cluster.cli("submit", "-w", "4", "--anyway", str(script), str(notes)).stdout.strip()
    assert states(cluster, first, large) == ["RUNNING", "PENDING"]
    cluster.cli("cancel", large)
    assert states(cluster, second, third) == ["PENDING", "PENDING"]
    cluster.cli("cancel", third)
    (notes / "1" / "go").touch()
    ends = [cluster.ended(job) for job in (first, second)]
    assert ends[0]["started_s"] < ends[1]["started_s"]


# ---------------------------------------------------------------- more and fewer workers


def test_a_job_is_scaled_up_and_down(cluster: Cluster, script: Path, notes: Path) -> None:
    job = cluster.submit(script, notes, "--steps", ENDLESS, "--until-go", "--slow", 0.002, mode="sync")
    cluster.running(job)
    assert "2 workers wanted" in cluster.cli("scale", job, "-w", "2").stdout
    clock = cluster.wait(job, lambda d: d["workers"]["live"] == 2, "more workers")["clock"]
    cluster.wait(job, lambda d: d["clock"] > clock + 5, "progress of all")
    cluster.ask(lambda client: client.scale(job, 1))
    clock = cluster.wait(job, lambda d: d["workers"]["live"] == 1, "one worker")["clock"]
    cluster.wait(job, lambda d: d["clock"] > clock + 5, "progress of one")
    until(lambda: len(cluster.processes(job)) == 2, "end of the others")
    (notes / "go").touch()
    document = cluster.ended(job)
    assert document["failure"] is None
    cluster.cli("scale", job, "-w", "2", code=2)


# ---------------------------------------------------------------- what is lost is started again


def test_a_job_goes_on_from_its_checkpoint_as_if_nothing_had_happened(
    cluster: Cluster, script: Path, notes: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint_s": 0.3, "grace_s": 1}
    fields = {"workers": 2, "mode": "sync", "restarts": 1, "settings": settings}
    job = cluster.submit(script, notes, "--steps", STEPS, "--slow", 0.01, **fields)
    cluster.wait(job, lambda d: d["checkpoints"], "checkpoint")
    os.kill(cluster.processes(job)["server/0"], signal.SIGKILL)
    document = cluster.ended(job)
    assert document["restarts"] == 1
    assert any("killed by signal 9" in text for text in document["warnings"])
    begun = int(cluster.log(job, "worker-0.1").splitlines()[0].removeprefix("rank 0 begins at step "))
    assert 0 < begun < STEPS
    assert weights(cluster.files(job) / "model.safetensors") == undisturbed(cluster, tmp_path)


def undisturbed(cluster: Cluster, folder: Path) -> bytes:
    """What two workers in sync come to in so many steps under ``downpour run``."""
    options = ["-w", "2", "--mode", "sync", "--threads", "1", "--out", str(folder / "out")]
    script = [str(SCRIPTS / "numbered.py"), str(folder / "alone"), "--steps", str(STEPS)]
    ended = cluster.spawn("run", ["run", *options, *script]).end()
    assert ended.code == 0, ended.text
    return weights(folder / "out" / "model.safetensors")


def test_a_job_is_resumed_with_other_counts(cluster: Cluster, script: Path, notes: Path) -> None:
    fields = {"workers": 1, "shards": 2, "mode": "sync", "settings": {"checkpoint_s": 0.3}}
    first = cluster.submit(script, notes, "--steps", ENDLESS, "--slow", 0.005, name="long", **fields)
    cluster.wait(first, lambda d: d["checkpoints"], "checkpoint")
    cluster.cli("cancel", first)
    clock = json.loads(max((cluster.files(first) / "checkpoints").glob("*/manifest.json")).read_text())["clock"]
    options = ["-w", "2", "-s", "1", "--threads", "1", "--mode", "async", "--resume", "long", "--follow"]
    ended = cluster.cli("submit", *options, str(script), str(notes), "--steps", str(clock + 20))
    assert f"rank 0 begins at step {clock}" in ended.stdout
    assert "rank 1 is done" in ended.stdout
    assert "there is no job" in cluster.cli("submit", "--resume", "nobody", str(script), code=2).stderr


def test_a_worker_that_somebody_ends_leaves_in_good_order(cluster: Cluster, script: Path, notes: Path) -> None:
    options = ["--steps", ENDLESS, "--until-go", "--slow", 0.005]
    job = cluster.submit(script, notes, *options, workers=2, min_workers=1)
    cluster.wait(job, lambda d: d["workers"]["live"] == 2 and d["clock"] > 5, "two workers")
    os.kill(cluster.processes(job)["worker/1"], signal.SIGTERM)
    cluster.wait(job, lambda d: d["workers"]["live"] == 1, "one worker")
    left = ["worker", 1, "ended", 143]
    ends = ("role", "index", "state", "exit_code")
    document = cluster.wait(job, lambda d: left in [[p[e] for e in ends] for p in d["processes"]], "exit code 143")
    assert document["state"] == "RUNNING"
    (notes / "go").touch()
    document = cluster.ended(job)
    assert any("worker/1 was asked to leave" in text for text in document["warnings"])
