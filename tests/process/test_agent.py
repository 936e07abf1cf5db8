"""Real agents and a scripted coordinator: processes, their output, and what is left when one of the two is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_coordinator import FakeCoordinator, Id

from downpour_common import messages as m
from downpour_common.keys import ROLES, ServerKeys, authorized, load_pair, new_keys
from downpour_common.transport.zeromq import new_key_pair

if TYPE_CHECKING:
    from conftest import Box, Running

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

JOB = "digits-0a1b2c"
ZERO: Id = (JOB, "worker", 0, 0)
ONE: Id = (JOB, "worker", 1, 0)
Start = Callable[..., "Running"]

WAIT = """
import signal, sys, time
print("begun", flush=True)
sys.stdin.read() if len(sys.argv) > 1 else None
while True:
    time.sleep(60)
"""
DRAIN = """
import signal, sys, time
def leave(number, frame):
    print("leaving in good order", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
print("begun", flush=True)
while True:
    time.sleep(60)
"""
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT
TALK = """
import os, sys
from pathlib import Path
gate = Path(sys.argv[1])
sys.stdout.write("".join(f"line {n}\\n" for n in range(100_000)))
sys.stdout.flush()
gate.with_suffix(".half").touch()
while not gate.exists():
    os.sched_yield()
os.write(1, bytes(range(256)) + b"\\r50%\\r100%\\nthe last line has no end")
"""


@pytest.fixture
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCoordinator]:
    """One that is there; at the end, none of the processes that it heard of is left."""
    fake = FakeCoordinator(tmp_path_factory.mktemp("coordinator"))
    yield fake
    fake.close()


@pytest.fixture
def start(box: Box, coordinator: FakeCoordinator) -> Iterator[Start]:
    """Starts an agent and waits until it has joined."""

    def begin(*options: str, role: str = "worker", join: bool = True, **environment: str) -> Running:
        command = [sys.executable, "-m", "downpour_deploy", role, "start", "--join", coordinator.join, *options]
        running = box.command(command, box.folder, **environment)
        if join:
            coordinator.until(lambda: coordinator.beats, "heartbeat")
        return running

    yield begin
    assert not box.wait_gone(sorted(coordinator.pids), 5.0), "processes of jobs are left"


def begun(coordinator: FakeCoordinator, *processes: Id) -> None:
    """Wait until the processes have written their first line."""
    coordinator.until(lambda: all("begun" in coordinator.log(p) for p in processes), "first line")


def leave(coordinator: FakeCoordinator, agent: Running) -> int:
    """SIGTERM to the agent, and the coordinator answers until it has left; its exit code."""
    os.kill(agent.pid, signal.SIGTERM)
    coordinator.until(lambda: coordinator.left, "word of leaving")
    return agent.end().code


def jobs_of(data: Path) -> list[str]:
    """Jobs that have a folder."""
    return sorted(entry.name for entry in (data / "jobs").iterdir())


def test_a_worker_runs_in_its_bundle_and_all_it_wrote_arrives(coordinator: FakeCoordinator, start: Start) -> None:
    agent = start(
        "--name", "w1", "--slots", "2", "--label", "zone=a", SECRET_OF_AGENT="kept", DOWNPOUR_X="not", OMP_X="1"
    )
    ready = agent.wait_line(r"^downpour worker ready: node w1, joined (\S+), slots 2")
    assert ready[1] == coordinator.join
    [register] = coordinator.registered
    assert (register.node, register.role) == ("w1", "worker")
    facts = register.document
    assert (facts["slots"], facts["labels"], facts["address"]) == (2, {"zone": "a"}, "")
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1 << 20

    script = """
import json, os, sys
import module_of_mine
context = json.loads(os.environ.pop("DOWNPOUR_WORKER"))
facts = {"context": context, "cwd": os.getcwd(), "args": sys.argv[1:], "environment": dict(os.environ)}
print(json.dumps(facts), file=sys.stderr)
print("no end of line", end="")
sys.exit(7)
"""
    keys = {"coordinator": "c" * 40, "job": ["p" * 40, "s" * 40], "shards": "d" * 40}
    spec = {"args": ["--lr", "0.1"], "env": {"COLOUR": "blue"}, "mode": "sync", "seed": 5}
    coordinator.start(ONE, coordinator.job(JOB, script, workers=3, spec=spec, keys=keys, threads=3))
    coordinator.until(lambda: ONE in coordinator.ended, "end")
    text = coordinator.log(ONE)
    assert text.endswith("\nno end of line")
    told = json.loads(text.splitlines()[0])
    assert told["args"] == ["--lr", "0.1"]
    assert told["cwd"].endswith(f"/jobs/{JOB}/work")
    context, environment = told["context"], told["environment"]
    assert (context["slot"], context["worker_epoch"], context["workers"], context["mode"]) == (1, 0, 3, "sync")
    assert (context["coordinator"], context["keys"], context["job"]) == (coordinator.address, keys, JOB)
    assert (environment["COLOUR"], environment["SECRET_OF_AGENT"], environment["OMP_NUM_THREADS"]) == (
        "blue",
        "kept",
        "3",
    )
    assert not [name for name in environment if name.startswith("DOWNPOUR_")]
    ended = coordinator.ended[ONE]
    assert (ended["code"], ended["error"], ended["stopped"], ended["tail"][-1]) == (7, "", "", "no end of line")
    assert ended["log_bytes"] == len(coordinator.logs[ONE])
    assert leave(coordinator, agent) == 0
    assert coordinator.left == ["the agent was stopped"]


def test_the_same_order_many_times_starts_one_process_and_jobs_share_what_was_fetched(
    coordinator: FakeCoordinator, start: Start, box: Box
) -> None:
    agent = start("--data-dir", str(box.folder / "data"))
    document = coordinator.job(JOB, WAIT, workers=2)
    for _ in range(3):
        coordinator.send(m.StartProcess(*ZERO, document))
        coordinator.send(m.StartProcess(*ONE, document))
    begun(coordinator, ZERO, ONE)
    coordinator.start(ZERO, document)
    assert coordinator.fetched == [(JOB, "bundle")]
    assert len(coordinator.pids) == 2
    again: Id = ("digits-ffff00", "worker", 0, 0)
    coordinator.start(again, document)  # the same code: nothing has to be fetched, not even known by this name
    begun(coordinator, again)
    assert coordinator.fetched == [(JOB, "bundle")]
    assert oct((box.folder / "data").stat().st_mode)[-3:] == "700"

    for process in (ZERO, ONE, again):
        coordinator.send(m.StopProcess(*process, 10.0))
    coordinator.until(lambda: len(coordinator.ended) == 3, "end of all")
    assert {d["code"] for d in coordinator.ended.values()} == {-signal.SIGTERM}
    assert {d["stopped"] for d in coordinator.ended.values()} == {"asked"}
    assert leave(coordinator, agent) == 0


def test_stopping_kills_what_does_not_end_and_what_it_started(coordinator: FakeCoordinator, start: Start) -> None:
    agent = start()
    child = """
import os, subprocess, sys
c = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("child", c.pid, flush=True)
"""
    coordinator.start(ZERO, coordinator.job(JOB, child + DEAF))
    begun(coordinator, ZERO)
    found = re.search(r"child (\d+)", coordinator.log(ZERO))
    assert found
    coordinator.pids.add(int(found[1]))
    coordinator.send(m.StopProcess(*ZERO, 0.3))
    coordinator.until(lambda: ZERO in coordinator.ended, "end")
    assert coordinator.ended[ZERO]["code"] == -signal.SIGKILL
    assert leave(coordinator, agent) == 0


def test_a_newer_epoch_takes_the_place_of_an_older_one(coordinator: FakeCoordinator, start: Start) -> None:
    agent = start()
    document = coordinator.job(JOB, WAIT)
    coordinator.start(ZERO, document)
    newer: Id = (JOB, "worker", 0, 1)
    coordinator.start(newer, document)
    assert coordinator.ended[ZERO]["stopped"] == "superseded"
    begun(coordinator, newer)
    assert leave(coordinator, agent) == 0


def test_output_arrives_byte_by_byte_though_the_coordinator_vanished_meanwhile(
    coordinator: FakeCoordinator, start: Start, box: Box, tmp_path: Path
) -> None:
    agent = start("--slots", "1")
    gate = tmp_path / "gate"
    coordinator.start(ZERO, coordinator.job(JOB, TALK, spec={"args": [str(gate)]}))
    coordinator.until(lambda: len(coordinator.logs[ZERO]) > 100_000, "output")
    coordinator.vanish(forget=True)
    agent.wait_until(gate.with_suffix(".half").exists, "half of the output")
    gate.touch()
    assert not box.wait_gone(sorted(coordinator.pids), 30.0)  # it ends while nobody is there
    coordinator.come_back()
    coordinator.until(lambda: ZERO in coordinator.ended, "end")
    expected = "".join(f"line {n}\n" for n in range(100_000)).encode()
    expected += bytes(range(256)) + b"\r50%\r100%\nthe last line has no end"
    assert bytes(coordinator.logs[ZERO]) == expected
    assert coordinator.ended[ZERO]["code"] == 0
    assert len({r.instance for r in coordinator.registered}) == 1
    assert len(coordinator.registered) == 2
    assert leave(coordinator, agent) == 0


def test_a_killed_agent_leaves_no_process(coordinator: FakeCoordinator, start: Start, box: Box) -> None:
    box.leaves_runtime_folder = True
    agent = start()
    coordinator.start(ZERO, coordinator.job(JOB, DEAF))
    begun(coordinator, ZERO)
    agent.kill()
    assert agent.end().code == -signal.SIGKILL
    assert not box.wait_gone(sorted(coordinator.pids), 30.0)

    # The next one tidies up behind it.
    left = list(box.tmpdir.glob("downpour-agent-*"))
    assert len(left) == 1
    coordinator.beats.clear()
    successor = start()
    assert not left[0].exists()
    assert len({r.instance for r in coordinator.registered}) == 2
    assert leave(coordinator, successor) == 0
    box.leaves_runtime_folder = False


def test_sigterm_lets_workers_leave_in_good_order(coordinator: FakeCoordinator, start: Start) -> None:
    agent = start()
    coordinator.start(ZERO, coordinator.job(JOB, DRAIN))
    begun(coordinator, ZERO)
    assert leave(coordinator, agent) == 0
    assert coordinator.beats[-1]["draining"]
    assert coordinator.ended[ZERO]["code"] == 143
    assert coordinator.ended[ZERO]["stopped"] == "agent"
    assert coordinator.log(ZERO) == "begun\nleaving in good order\n"
    assert "stopping; 1 process to end in good order" in agent.text


def test_a_second_signal_waits_for_nobody(coordinator: FakeCoordinator, start: Start) -> None:
    agent = start("--grace", "1000")
    coordinator.start(ZERO, coordinator.job(JOB, DEAF))
    begun(coordinator, ZERO)
    os.kill(agent.pid, signal.SIGINT)
    agent.wait_line("a second signal ends them at once")
    os.kill(agent.pid, signal.SIGINT)
    coordinator.until(lambda: coordinator.left, "word of leaving")
    assert agent.end().code == 0
    assert coordinator.ended[ZERO]["code"] == -signal.SIGKILL


def test_forgetting_a_job_removes_all_of_it(coordinator: FakeCoordinator, start: Start, box: Box) -> None:
    data = box.folder / "data"
    agent = start("--data-dir", str(data))
    other: Id = ("other-1", "worker", 0, 0)
    coordinator.start(ZERO, coordinator.job(JOB, WAIT))
    coordinator.start(other, coordinator.job("other-1", WAIT + "# of another job"))
    begun(coordinator, ZERO, other)
    assert jobs_of(data) == [JOB, "other-1"]
    coordinator.send(m.ForgetJob(JOB))
    coordinator.until(lambda: not coordinator.state(ZERO) and jobs_of(data) == ["other-1"], "end of the job")
    assert coordinator.state(other) == "running"
    assert ZERO not in coordinator.ended  # nobody asked
    assert leave(coordinator, agent) == 0


def test_without_a_coordinator_processes_end_after_the_orphan_timeout(
    coordinator: FakeCoordinator, start: Start, box: Box
) -> None:
    agent = start("--orphan-timeout", "1.5", "--grace", "5")
    coordinator.start(ZERO, coordinator.job(JOB, DRAIN))
    begun(coordinator, ZERO)
    coordinator.vanish()
    agent.wait_line("ending 1 processes: the coordinator was not heard of for")
    assert not box.wait_gone(sorted(coordinator.pids), 30.0)
    coordinator.come_back()
    coordinator.until(lambda: ZERO in coordinator.ended, "end")
    assert (coordinator.ended[ZERO]["code"], coordinator.ended[ZERO]["stopped"]) == (143, "orphaned")
    assert leave(coordinator, agent) == 0


def test_what_cannot_be_started_says_why(coordinator: FakeCoordinator, start: Start) -> None:
    agent = start()
    good = coordinator.job(JOB, WAIT)
    documents = [
        {**good, "bundle": "0" * 64},
        {**good, "fetch": ["checkpoints/000001/manifest.json"]},
        {**good, "fetch": ["../../../etc/passwd"]},
        {**good, "gpu": 77},
        {**good, "spec": {"name": "job"}},
        {**good, "spec": {**good["spec"], "env": {"DOWNPOUR_WORKER": "{}"}}},
        {},
    ]
    patterns = ["SHA-256", "there is no checkpoints", "no path within", "GPU 77", "script", "env", "SHA-256"]
    for index, (document, pattern) in enumerate(zip(documents, patterns, strict=True)):
        process: Id = (f"{JOB}-{index}", "worker", index, 0)
        coordinator.files[process[0], "bundle"] = coordinator.files[JOB, "bundle"]
        coordinator.start(process, document)
        assert re.search(pattern, coordinator.ended[process]["error"]), coordinator.ended[process]
        assert coordinator.ended[process]["pid"] == 0
    assert leave(coordinator, agent) == 0


def test_a_server_has_its_files_before_it_starts_and_listens_where_it_is_reached(
    coordinator: FakeCoordinator, start: Start, box: Box
) -> None:
    data = box.folder / "data"
    agent = start("--data-dir", str(data), "--memory", "1GiB", role="server")
    assert coordinator.registered[0].document["address"] == "127.0.0.1"
    assert coordinator.registered[0].document["memory_bytes"] == 1 << 30
    manifest, shard = "checkpoints/000003/manifest.json", "checkpoints/000003/shard-0.safetensors"
    content = os.urandom((5 << 20) + 17)
    document = coordinator.job(JOB, WAIT, fetch=[manifest, shard])
    coordinator.files[JOB, manifest], coordinator.files[JOB, shard] = b"{}", content
    process: Id = (JOB, "server", 0, 0)
    coordinator.start(process, document)
    folder = data / "jobs" / JOB
    assert (folder / manifest).read_bytes() == b"{}"
    assert (folder / shard).read_bytes() == content
    assert not (folder / "work").exists()
    pid = coordinator.pid(process)
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    config = json.loads(next(v for v in variables if v.startswith(b"DOWNPOUR_SHARD=")).partition(b"=")[2])
    assert config["endpoint"] == "tcp://127.0.0.1:*"
    assert (config["folder"], config["upload"]) == (str(folder), True)
    assert leave(coordinator, agent) == 0


def test_a_refused_node_and_one_without_a_coordinator_end_with_codes_of_their_own(
    coordinator: FakeCoordinator, start: Start, box: Box
) -> None:
    coordinator.refuse = "no more nodes"
    refused = start(join=False)
    coordinator.until(lambda: "turned this node down" in refused.text, "word of the refusal")
    assert refused.end().code == 77
    assert "no more nodes" in refused.text
    coordinator.vanish()
    assert start("--start-timeout", "1", join=False).end().code == 69


def test_a_script_that_leaves_keeps_its_own_children_until_it_has_left(
    coordinator: FakeCoordinator, start: Start
) -> None:
    """As data loaders' processes, which would not survive a SIGTERM."""
    agent = start()
    script = """
import signal, subprocess, sys
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def leave(number, frame):
    out, _ = child.communicate(b"still here")
    print(out.decode(), child.returncode, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
print("begun", flush=True)
while True:
    signal.pause()
"""
    coordinator.start(ZERO, coordinator.job(JOB, script))
    begun(coordinator, ZERO)
    coordinator.send(m.StopProcess(*ZERO, 30.0))
    coordinator.until(lambda: ZERO in coordinator.ended, "end")
    assert coordinator.log(ZERO) == "begun\nstill here 0\n"
    assert leave(coordinator, agent) == 0


def test_the_service_manager_and_machines_are_told_in_their_ways(
    coordinator: FakeCoordinator, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("systemd") / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(10.0)
        agent = start("--json", "--name", "n1", role="server", NOTIFY_SOCKET=str(path))
        heard = [manager.recv(1000).decode()]
        while heard[-1] != "READY=1":
            heard.append(manager.recv(1000).decode())
        ready = json.loads(agent.wait_line("ready")[0] and agent.text.splitlines()[0])
        assert (ready["event"], ready["node"], ready["joined"]) == ("ready", "n1", coordinator.join)
        assert leave(coordinator, agent) == 0
        while not heard[-1].startswith("STOPPING=1"):
            heard.append(manager.recv(1000).decode())
    assert f"STATUS=joined {coordinator.join}, 0 processes" in heard


def test_keys_decide_who_joins(
    start: Start, coordinator: FakeCoordinator, box: Box, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours, theirs, unknown = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs", "unknown"))
    for folder in (ours, theirs, unknown):
        new_keys(folder, {role: new_key_pair() for role in ROLES})
    (unknown / "coordinator.pub").write_bytes((ours / "coordinator.pub").read_bytes())
    keys = ServerKeys(load_pair(ours, "coordinator"), authorized(ours))
    guarded = FakeCoordinator(tmp_path_factory.mktemp("guarded"), keys)
    try:
        agent = start("--join", guarded.join, "--keys", str(ours), join=False)
        guarded.until(lambda: guarded.beats, "heartbeat")
        strangers = [
            (start("--join", guarded.join, "--keys", str(theirs), "--name", "w2", join=False), "coordinator.pub"),
            (start("--join", guarded.join, "--keys", str(unknown), "--name", "w3", join=False), "not accept our key"),
            (start("--join", guarded.join, "--name", "w4", join=False), "not accept our key"),
        ]
        for stranger, word in strangers:
            guarded.until(lambda: word in stranger.text, f"the words {word}")  # noqa: B023  asked before the next
            assert stranger.end().code == 77
        assert {r.node for r in guarded.registered} == {guarded.registered[0].node}
        assert leave(guarded, agent) == 0
    finally:
        guarded.close()


def test_going_without_keys_onto_a_network_is_warned_of(start: Start) -> None:
    options = ("--join", "192.0.2.1:7077", "--security", "none", "--start-timeout", "0.3")
    ended = start(*options, join=False).end()
    assert ended.code == 69
    assert "WARNING: --security none" in ended.stderr
    assert "no coordinator at 192.0.2.1:7077 within" in ended.stderr


def test_a_data_folder_has_one_agent(coordinator: FakeCoordinator, start: Start, box: Box) -> None:
    agent = start("--data-dir", "data")
    second = start("--data-dir", "data", "--name", "w2", join=False).end()
    assert second.code == 2
    assert "another agent uses it" in second.stderr
    assert leave(coordinator, agent) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--join", "192.0.2.1:7077"), "--keys DIR"),
        (("--join", "nowhere"), "HOST:PORT"),
        (("--name", "Röntgen"), "--name"),
        (("--slots", "many"), "--slots"),
        (("--keys", "/no/such/folder"), "--keys"),
        (("--device", "abacus"), "--device"),
        (("--label", "zone"), "--label"),
    ],
)
def test_options_that_cannot_be_used_are_refused(start: Start, options: tuple[str, ...], message: str) -> None:
    ended = start(*options, join=False).end()
    assert ended.code == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
