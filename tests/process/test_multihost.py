"""Training over several hosts (network namespaces), all with keys: what is trained, and what survives which loss."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts as network
import pytest
from cluster_kit import EXAMPLES, MARK, PATIENCE_S, SCRIPTS, everybody, until, weights
from gone import wait_gone
from hosts import Hosts

pytestmark = [
    pytest.mark.process,
    pytest.mark.long,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(network.missing()), reason=network.missing() or "-"),
]

SERVERS, WORKERS = ("s1", "s2"), ("w1", "w2", "w3")
AGENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SERVERS, ("server",)),
    **dict.fromkeys(WORKERS, ("worker", "--slots", "2")),
}
NODE_TIMEOUT_S = 3.0
GRACE_S = 2.0
GATE = 10
RANKS = 2
"""Workers of ``numbered.py``."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A cluster of six hosts and a user's."""
    with Hosts(tmp_path_factory.mktemp("hosts"), NODE_TIMEOUT_S) as made:
        made.start_coordinator()
        made.start_agents(AGENTS)
        yield made


@pytest.fixture
def cluster(running: Hosts) -> Iterator[Hosts]:
    """The cluster, whole at the beginning and at the end of a test; its logs are shown when the test fails."""
    yield running
    running.show()
    assert running.coordinator is not None
    assert running.coordinator.process.poll() is None
    for name in AGENTS:
        running.until_node(name, "READY")
    jobs = running.ask(lambda client: client.jobs())
    assert all(j["state"] in ("SUCCEEDED", "FAILED", "CANCELLED") for j in jobs), [(j["job"], j["state"]) for j in jobs]
    agents = {d.pid for d in running.daemons}
    of_jobs = [p for p, e in everybody() if e.get(MARK) == running.mark and p not in agents]
    assert not wait_gone(of_jobs, PATIENCE_S), "processes of jobs are left"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with the scripts of these tests and nothing else."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("numbered.py", "drained.py", "ledger.py"):
        shutil.copy(SCRIPTS / name, folder)
    return folder


def run_alone(cluster: Hosts, out: Path, workers: int, script: Path, *arguments: object) -> bytes:
    """The weights that ``downpour run`` on this machine gives, with two shards in sync."""
    options = ["-w", str(workers), "-s", "2", "--mode", "sync", "--threads", "1", "--out", str(out)]
    ended = cluster.spawn("run", ["run", *options, str(script), *map(str, arguments)]).end()
    assert ended.code == 0, ended.text
    return weights(out / "model.safetensors")


@pytest.fixture(scope="module")
def numbered_alone(running: Hosts, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What ``numbered.py --steps 60`` comes to when nothing happens to it."""
    folder = tmp_path_factory.mktemp("alone")
    return run_alone(running, folder / "out", RANKS, SCRIPTS / "numbered.py", folder / "notes", "--steps", 60)


def all_there(folder: Path, name: str, ranks: int) -> None:
    """Wait for a file of each rank."""
    until(lambda: all((folder / f"{name}-{rank}").exists() for rank in range(ranks)), f"{name} of all ranks")


def where(document: dict[str, Any], role: str) -> set[str]:
    """The hosts of the job's processes of a role."""
    return {p["node"] for p in document["processes"] if p["role"] == role}


# ---------------------------------------------------------------- training


def test_training_on_five_hosts_gives_the_weights_of_one(cluster: Hosts, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    script = Path(shutil.copy(EXAMPLES / "char_transformer.py", folder))  # its weights are tied
    options = ["--steps", "4", "--max-chars", "20000", "--batch-size", "8", "--width", "32", "--layers", "1"]
    alone = run_alone(cluster, tmp_path / "alone", 3, script, *options)
    cut = ["-w", "3", "-s", "2", "--mode", "sync", "--threads", "1", "--follow"]
    ended = cluster.cli("submit", *cut, str(script), *options)
    assert "final validation loss" in ended.stdout
    [document] = [j for j in cluster.ask(lambda client: client.jobs()) if j["name"] == "char-transformer"]
    document = cluster.describe(document["job"])
    assert (document["state"], document["exit_code"]) == ("SUCCEEDED", 0)
    assert where(document, "server") == set(SERVERS)
    assert where(document, "worker") == set(WORKERS)
    got = cluster.cli("get", document["job"], "-o", str(tmp_path / "got"), "--json").document
    assert "model.safetensors" in got["written"]
    assert weights(tmp_path / "got" / "model.safetensors") == alone


def test_a_job_does_not_notice_that_another_crashes(
    cluster: Hosts, code: Path, tmp_path: Path, numbered_alone: bytes
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    fields = {"workers": RANKS, "shards": 2, "mode": "sync"}
    one = cluster.submit(code / "numbered.py", good, "--steps", 60, "--gate", GATE, **fields)
    other = cluster.submit(code / "numbered.py", bad, "--steps", 60, "--crash", "0,15", workers=1, mode="sync")
    all_there(good, "reached", RANKS)
    document = cluster.ended(other, "FAILED")
    assert (document["reason"], document["failure"]["role"]) == ("SCRIPT_FAILED", "worker")
    assert document["failure"]["host"] in WORKERS
    assert "RuntimeError: the cat sat on the keyboard" in document["failure"]["details"]
    (good / "go").touch()
    cluster.ended(one)
    assert weights(cluster.files(one) / "model.safetensors") == numbered_alone


# ---------------------------------------------------------------- the coordinator is killed


def test_nothing_is_lost_when_the_coordinator_is_killed(
    cluster: Hosts, code: Path, tmp_path: Path, numbered_alone: bytes
) -> None:
    notes = tmp_path / "notes"
    fields = {"workers": RANKS, "shards": 2, "mode": "sync", "settings": {"checkpoint_s": 1}}
    job = cluster.submit(code / "numbered.py", notes, "--steps", 60, "--gate", GATE, **fields)
    all_there(notes, "reached", RANKS)
    assert cluster.coordinator is not None
    cluster.coordinator.kill()
    (notes / "go").touch()
    all_there(notes, "past", RANKS)  # training goes on without the coordinator
    begun_s = time.monotonic()
    cluster.start_coordinator()
    ready_s = time.monotonic() - begun_s
    document = cluster.ended(job)
    print(f"FIGURE coordinator ready {ready_s:.2f} s after its start, job over {time.monotonic() - begun_s:.2f} s")
    assert weights(cluster.files(job) / "model.safetensors") == numbered_alone
    for rank in range(RANKS):
        lines = [f"line {step} of rank {rank}" for step in range(1, 61)]
        expected = [f"rank {rank} begins at step 0", *lines, f"rank {rank} is done"]
        assert cluster.log(job, f"worker-{rank}").splitlines() == expected
    rows = Counter((row["worker"], row["step"]) for row in cluster.metrics(job) if "worker" in row)
    assert rows == Counter({(rank, step): 1 for rank in range(RANKS) for step in range(1, 61)})
    assert (document["clock"], document["restarts"], document["warnings"]) == (60, 0, [])
    assert {(p["role"], p["index"], p["state"], p["exit_code"]) for p in document["processes"]} == {
        *(("server", i, "ended", 0) for i in range(2)),
        *(("worker", i, "ended", 0) for i in range(RANKS)),
    }
    assert f"{job}  SUCCEEDED" in cluster.cli("status", job).stdout


# ---------------------------------------------------------------- jobs are ended


def test_within_five_seconds_of_cancel_no_process_is_left_on_any_host(
    cluster: Hosts, code: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    options = ["--steps", 1 << 30, "--deaf", "--child", "--slow", 0.02]
    job = cluster.submit(code / "numbered.py", notes, *options, workers=2, shards=1, settings={"grace_s": 30})
    cluster.running(job)
    pids = cluster.all_of(job)
    assert len(pids) == 5  # two workers with a child each, one shard
    begun_s = time.monotonic()
    cluster.ask(lambda client: client.cancel(job))
    assert not wait_gone(pids, 5.0)  # five seconds are what is promised
    print(f"FIGURE all processes gone {time.monotonic() - begun_s:.2f} s after cancel (scripts that ignore SIGTERM)")
    assert not cluster.all_of(job)
    document = cluster.ended(job, "CANCELLED")
    assert document["reason"] == "CANCELLED"


# ---------------------------------------------------------------- hosts are lost


@pytest.mark.parametrize(("host", "mode"), [("w2", "sync"), ("s2", "async")])
def test_a_host_that_is_cut_off_ends_the_job_with_its_name(
    cluster: Hosts, code: Path, tmp_path: Path, host: str, mode: str
) -> None:
    options = ["--steps", 1 << 30, "--slow", 0.01]
    fields = {"workers": 2, "shards": 2, "mode": mode, "settings": {"grace_s": GRACE_S}}
    job = cluster.submit(code / "numbered.py", tmp_path / "notes", *options, **fields)
    cluster.running(job)
    elsewhere = {p["index"] for p in cluster.describe(job)["processes"] if p["node"] == host}
    there = [pid for name, pid in cluster.processes(job).items() if int(name[-1]) in elsewhere and name[0] == host[0]]
    cluster.cut(host)
    try:
        begun_s = time.monotonic()
        document = cluster.ended(job, "FAILED", NODE_TIMEOUT_S + 2 * GRACE_S + 5)  # this limit is what is promised
        print(f"FIGURE job over {time.monotonic() - begun_s:.2f} s after {host} was cut, timeout {NODE_TIMEOUT_S} s")
        assert document["failure"]["host"] == host
        assert (document["reason"], host in document["message"]) == ("NODE_LOST", True), document["message"]
        assert cluster.node(host)["state"] == "LOST"
        assert not wait_gone([p for p in cluster.all_of(job) if p not in there], GRACE_S)
    finally:
        cluster.mend(host)
    cluster.until_node(host, "READY")
    assert not wait_gone(there, PATIENCE_S)


def test_a_worker_whose_host_is_cut_off_is_replaced(cluster: Hosts, code: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    fields = {"workers": 2, "shards": 1, "mode": "async", "restarts": 1}
    job = cluster.submit(code / "numbered.py", notes, "--steps", 60, "--gate", GATE, **fields)
    all_there(notes, "reached", 2)
    slot = next(p["index"] for p in cluster.describe(job)["processes"] if p["node"] == "w2")
    cluster.cut("w2")
    try:
        document = cluster.wait(job, lambda d: d["restarts"] == 1 and d["workers"]["live"] == 2, "replacement")
        [new] = [p for p in document["processes"] if p["role"] == "worker" and p["index"] == slot]
        assert (new["epoch"], new["node"]) == (1, "w3")
        (notes / "go").touch()
        document = cluster.ended(job)
        assert any("w2" in text and "replaced" in text for text in document["warnings"])
        assert document["model"]
    finally:
        cluster.mend("w2")


# ---------------------------------------------------------------- agents are killed


def test_a_job_begins_again_when_the_agent_of_a_server_was_killed(cluster: Hosts, code: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    fields = {"workers": 1, "shards": 2, "mode": "sync", "restarts": 1, "settings": {"grace_s": GRACE_S}}
    job = cluster.submit(code / "numbered.py", notes, "--steps", 30, "--gate", GATE, **fields)
    all_there(notes, "reached", 1)
    pid = cluster.processes(job)["server/1"]
    cluster.agents["s2"].kill()
    assert not wait_gone([pid], PATIENCE_S)  # a shard dies with its agent
    cluster.begin_agent("server", "s2")
    (notes / "go").touch()
    document = cluster.ended(job)
    assert document["restarts"] == 1
    assert any("s2" in text for text in document["warnings"])
    cluster.agents["s2"].line("server ready")


def test_a_job_goes_on_when_the_agent_of_a_worker_was_killed(cluster: Hosts, code: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    fields = {"workers": 2, "shards": 1, "mode": "async", "min_workers": 1}
    job = cluster.submit(code / "numbered.py", notes, "--steps", 30, "--gate", GATE, **fields)
    all_there(notes, "reached", 2)
    cluster.agents["w2"].kill()
    document = cluster.wait(job, lambda d: d["workers"]["live"] == 1, "end of the worker on w2")
    (notes / "go").touch()
    document = cluster.ended(job)
    assert any("w2" in text and "go on without" in text for text in document["warnings"])
    cluster.start_agents({"w2": AGENTS["w2"]})


def test_a_host_is_drained_and_every_sample_is_trained_once(cluster: Hosts, code: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = cluster.submit(code / "drained.py", notes, workers=2, shards=1, mode="async", min_workers=1)
    all_there(notes, "reached", 2)
    agent = cluster.agents["w1"]
    agent.signal(signal.SIGTERM)
    cluster.until_node("w1", "DRAINING")
    (notes / "go").touch()
    assert agent.end().code == 0
    cluster.ended(job)
    cluster.until_node("w1", "")
    seen = Counter(line for path in notes.glob("ids-*") for line in path.read_text().splitlines())
    assert seen == Counter({f"{epoch} {number}": 1 for epoch in range(2) for number in range(197)})
    cluster.start_agents({"w1": AGENTS["w1"]})


def test_the_machines_own_network_is_as_before(cluster: Hosts) -> None:
    links = set(os.listdir("/sys/class/net"))
    assert not [name for name in links if name.startswith(("v-", "br0"))]
