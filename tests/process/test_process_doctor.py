"""``downpour doctor`` against real coordinators: one with keys, one without, and nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Box, Ended, Running

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(120)]

COMMAND = """
import sys, typer
from downpour_deploy.doctor import register
app = typer.Typer()
app.callback()(lambda: None)
register(app)
app(prog_name="downpour", args=["doctor", *sys.argv[1:]])
"""
LATER = {"version", "clock", "round-trip", "throughput", "nodes"}
TORCH = "__version__ = '2.6.0'\n\nclass version:\n    cuda = None\n"
"""Instead of the real one, whose import takes longer than all the rest."""


class Cluster:
    """A coordinator, its address, and folders of keys beside it."""

    def __init__(self, box: Box, keys: bool) -> None:
        self.box = box
        if keys:
            for name in ("keys", "other"):
                self.downpour("keys", "new", "--dir", name)
            for name, own, house in (
                ("mine", "keys", "keys"),
                ("refused", "other", "keys"),
                ("astray", "keys", "other"),
            ):
                (box.folder / name).mkdir(mode=0o700)
                for role in ("user", "server", "worker"):
                    shutil.copy(box.folder / own / f"{role}.key", box.folder / name)
                shutil.copy(box.folder / house / "coordinator.pub", box.folder / name)
        options = ["--keys", "keys"] if keys else []
        self.coordinator = self.start("coordinator", "start", "--bind", "127.0.0.1:0", "--data-dir", "data", *options)
        self.address = self.coordinator.wait_line(r"^downpour coordinator ready: (\S+), data in ")[1]

    def start(self, *arguments: str) -> Running:
        """A command of downpour that goes on."""
        return self.box.command([sys.executable, "-m", "downpour_deploy", *arguments], self.box.folder)

    def downpour(self, *arguments: str) -> None:
        """A command of downpour that ends well."""
        ended = self.start(*arguments).end()
        assert ended.code == 0, ended.text

    def close(self) -> None:
        self.coordinator.interrupt()
        assert self.coordinator.end().code == 0
        self.box.close()


@pytest.fixture(scope="module")
def guarded(make_box: Callable[[], Box]) -> Iterator[Cluster]:
    """A cluster with keys."""
    cluster = Cluster(make_box(), keys=True)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def unguarded(make_box: Callable[[], Box]) -> Iterator[Cluster]:
    """A cluster without."""
    cluster = Cluster(make_box(), keys=False)
    yield cluster
    cluster.close()


def command(box: Box, *arguments: str, torch: bool = False, **environment: str) -> Ended:
    """Run the command; with the real torch if need be."""
    if not torch:
        stub = box.folder / "stub"
        stub.mkdir(exist_ok=True)
        (stub / "torch.py").write_text(TORCH)
        environment["PYTHONPATH"] = str(stub)
    return box.command([sys.executable, "-c", COMMAND, *arguments], box.folder, **environment).end()


def doctor(box: Box, *arguments: str, code: int, torch: bool = False) -> dict[str, dict[str, str]]:
    """Checks by name; the command ended with ``code``, and said the same of itself."""
    ended = command(box, *arguments, "--json", torch=torch)
    assert ended.code == code, ended.text
    assert ended.stderr == ""
    document: dict[str, Any] = ended.document
    checks = {check["name"]: check for check in document["checks"]}
    assert len(checks) == len(document["checks"])
    failed = [name for name, check in checks.items() if check["status"] == "FAIL"]
    assert document["ok"] == (not failed) == (code == 0)
    assert all(bool(check["action"]) == (check["status"] != "PASS") for check in checks.values())
    assert not set(document["skipped"]) & set(checks)
    return checks


def statuses(checks: dict[str, dict[str, str]], *names: str) -> list[str]:
    return [checks[name]["status"] for name in names]


def test_a_user_with_the_right_keys_sees_that_all_is_well(guarded: Cluster) -> None:
    checks = doctor(guarded.box, "--join", guarded.address, "--keys", "mine", code=0, torch=True)
    names = [
        "keys",
        "name",
        "connection",
        "security",
        "version",
        "clock",
        "address",
        "python",
        "torch",
        "shared-memory",
    ]
    assert statuses(checks, *names) == ["PASS"] * len(names)
    assert "encrypted" in checks["security"]["detail"]
    assert "MB/s" in checks["throughput"]["detail"]
    assert checks["nodes"]["status"] == "WARN", "nobody has joined"


@pytest.mark.parametrize("role", ["server", "worker"])
def test_agents_come_with_their_own_keys_and_cannot_ask_for_nodes(guarded: Cluster, role: str) -> None:
    checks = doctor(guarded.box, "--join", guarded.address, "--keys", "mine", "--role", role, code=0)
    assert f"presenting {role}.key" in checks["keys"]["detail"]
    assert checks["security"]["status"] == "PASS"
    assert "nodes" not in checks


def test_a_key_that_is_not_known_is_refused(guarded: Cluster) -> None:
    checks = doctor(guarded.box, "--join", guarded.address, "--keys", "refused", code=77)
    assert statuses(checks, "keys", "connection", "security") == ["PASS", "PASS", "FAIL"]
    assert "put user.pub" in checks["security"]["action"]
    assert checks["torch"]["status"] == "PASS", "what can still be checked is checked"


def test_another_coordinator_than_expected(guarded: Cluster) -> None:
    checks = doctor(guarded.box, "--join", guarded.address, "--keys", "astray", code=77)
    assert "copy coordinator.pub" in checks["security"]["action"]


def test_no_keys_where_keys_are_needed(guarded: Cluster) -> None:
    checks = doctor(guarded.box, "--join", guarded.address, code=77)
    assert "--keys" in checks["security"]["action"]


def test_keys_where_the_coordinator_has_none(guarded: Cluster, unguarded: Cluster) -> None:
    checks = doctor(guarded.box, "--join", unguarded.address, "--keys", "mine", code=77)
    assert checks["security"]["action"] == "start the coordinator with --keys"


def test_keys_that_others_can_read(guarded: Cluster) -> None:
    folder = guarded.box.folder / "open"
    shutil.copytree(guarded.box.folder / "mine", folder)
    (folder / "user.key").chmod(0o644)
    checks = doctor(guarded.box, "--join", guarded.address, "--keys", "open", code=1)
    assert checks["keys"]["action"] == "chmod 600 open/user.key"
    assert statuses(checks, "connection", "security") == ["PASS", "FAIL"]
    doctor(guarded.box, "--join", guarded.address, "--keys", "open", "--role", "worker", code=0)


def test_without_keys_on_one_host(unguarded: Cluster) -> None:
    server = unguarded.start("server", "start", "--join", unguarded.address, "--name", "alone")
    server.wait_line(r"^downpour server ready: node alone")
    checks = doctor(unguarded.box, "--join", unguarded.address, "--role", "server", code=0)
    assert statuses(checks, "keys", "security", "address", "ports") == ["PASS"] * 4
    assert checks["address"]["detail"].startswith("127.0.0.1 (lo)")
    assert checks["nodes"]["detail"] == "1 joined, but no worker"
    server.interrupt()
    assert server.end().code == 0


def test_a_coordinator_that_is_stopped(unguarded: Cluster) -> None:
    os.kill(unguarded.coordinator.pid, signal.SIGSTOP)
    try:
        checks = doctor(unguarded.box, "--join", unguarded.address, "--timeout", "1", code=69)
    finally:
        os.kill(unguarded.coordinator.pid, signal.SIGCONT)
    assert checks["connection"]["detail"] == f"{unguarded.address} accepts connections but says nothing"
    doctor(unguarded.box, "--join", unguarded.address, code=0)


def test_the_environment_names_coordinator_and_keys(guarded: Cluster) -> None:
    environment = {"DOWNPOUR_COORDINATOR": guarded.address, "DOWNPOUR_KEYS": "mine"}
    ended = command(guarded.box, **environment)
    assert ended.code == 0, ended.text
    assert "FAIL  " not in ended.stdout
    assert ended.stdout.splitlines()[-1].endswith(" 0 FAIL")


def test_nobody_there(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    checks = doctor(box, "--join", f"127.0.0.1:{port}", code=69)
    assert statuses(checks, "name", "connection") == ["PASS", "FAIL"]
    assert "downpour coordinator start" in checks["connection"]["action"]
    assert not {"security", *LATER} & set(checks)
    assert checks["torch"]["status"] == "PASS"


def test_something_else_there(box: Box) -> None:
    server = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]
    web = box.command(server, box.folder)
    port = web.wait_line(r"port (\d+)")[1]
    checks = doctor(box, "--join", f"127.0.0.1:{port}", "--timeout", "1", code=69)
    assert "correct the port in --join" in checks["connection"]["action"]
    web.interrupt()
    web.end()


def test_a_name_that_nobody_knows(box: Box) -> None:
    checks = doctor(box, "--join", "nowhere.invalid:7070", "--security", "none", code=69)
    assert statuses(checks, "keys", "name") == ["WARN", "FAIL"]


def test_without_a_coordinator_the_host_is_checked(box: Box) -> None:
    checks = doctor(box, code=0)
    assert {"python", "torch", "cores", "memory", "disk"} <= set(checks)
    assert "connection" not in checks


def test_bad_usage(box: Box) -> None:
    ended = command(box, "--join", "head", "--role", "boss")
    assert ended.code == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "downpour: --role boss: expected one of user, server, worker",
        "downpour: --join head: expected HOST:PORT",
    ]


def test_asking_for_the_command_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import downpour_deploy.doctor, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"torch", "numpy", "zmq", "msgpack", "pydantic", "uvloop"} & set(json.loads(done.stdout))
