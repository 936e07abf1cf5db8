"""`downpour doctor`: from facts to verdicts, and how a conversation becomes facts."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from downpour.jobs.access import Access
from downpour_common import exitcodes
from downpour_common.errors import ConfigError
from downpour_common.keys import add_key, new_keys
from downpour_common.messages import ListNodes, Message, Ping, Pong, Refusal, Refused, Reply
from downpour_common.transport.zeromq import new_key_pair
from downpour_deploy.doctor import look_cluster, look_host, look_keys, look_way, show
from downpour_deploy.doctor.facts import (
    ClusterFacts,
    DiskFacts,
    Facts,
    HostFacts,
    Interface,
    KeyFile,
    KeysFacts,
    Throughput,
    TorchFacts,
    WayFacts,
)
from downpour_deploy.doctor.gather import Options, gather
from downpour_deploy.doctor.judge import NEEDS_COORDINATOR, judge, skipped
from downpour_deploy.doctor.verdict import Status, Verdict, exit_code, failed, passed, warned

GIB = 1 << 30
HOST = HostFacts(
    python="3.11.7",
    version="0.1.0",
    cores=8,
    host_cores=8,
    memory_bytes=32 * GIB,
    host_memory_bytes=32 * GIB,
    gpus=0,
    omp_threads="",
    files_soft=1024,
    files_hard=524288,
    shm_bytes=16 * GIB,
    shared_memory_error="",
    torch=TorchFacts("", "2.13.0+cpu"),
    disks=(DiskFacts("/tmp", 50 * GIB, True),),
)
KEYS = KeysFacts(
    "keys", False, False, "worker.key", files=(KeyFile("coordinator.pub", 0o644), KeyFile("worker.key", 0o600))
)
WAY = WayFacts(
    "head",
    7070,
    ("10.0.0.1",),
    mechanism="CURVE",
    source="10.0.0.7",
    interface=Interface("eth0", "10.0.0.7", 24),
    ports=(32768, 60999),
)
NODES: tuple[dict[str, Any], ...] = (
    {"node": "a-server", "role": "server", "state": "READY", "host": "a", "address": "10.0.0.2", "version": "0.1.0"},
    {"node": "b-worker", "role": "worker", "state": "READY", "host": "b", "address": "", "version": "0.1.0"},
)
CLUSTER = ClusterFacts(
    "answered",
    {"version": "0.1.0", "security": "curve"},
    (0.0004, 0.0005, 0.0009),
    0.01,
    0.0002,
    Throughput(64 << 20, 0.5),
    NODES,
)
FACTS = Facts("worker", KEYS, WAY, CLUSTER, HOST)


def verdict(facts: Facts, name: str) -> Verdict:
    """The one verdict of that name."""
    (found,) = [v for v in judge(facts) if v.name == name]
    return found


def of_host(name: str, role: str = "worker", **changed: Any) -> Verdict:
    return verdict(replace(FACTS, role=role, host=replace(HOST, **changed)), name)


def of_way(name: str, role: str = "server", cluster: ClusterFacts | None = CLUSTER, **changed: Any) -> Verdict:
    return verdict(replace(FACTS, role=role, cluster=cluster, way=replace(WAY, **changed)), name)


def of_cluster(name: str, role: str = "worker", **changed: Any) -> Verdict:
    return verdict(replace(FACTS, role=role, cluster=replace(CLUSTER, **changed)), name)


def of_keys(role: str = "worker", **changed: Any) -> Verdict:
    return verdict(replace(FACTS, role=role, keys=replace(KEYS, **changed)), "keys")


# ---------------------------------------------------------------- as a whole


@pytest.mark.parametrize("role", ["user", "server", "worker"])
def test_a_healthy_host_passes_everything(role: str) -> None:
    verdicts = judge(replace(FACTS, role=role))
    assert [v for v in verdicts if v.status is not Status.PASS] == []
    assert exit_code(verdicts) == exitcodes.OK
    assert skipped(FACTS, verdicts) == []
    assert show.document(verdicts, [])["ok"] is True
    assert len({v.name for v in verdicts}) == len(verdicts)
    assert set(NEEDS_COORDINATOR) <= {v.name for v in verdicts}


def test_without_a_coordinator_only_the_host_is_judged() -> None:
    facts = Facts("user", None, None, None, HOST)
    verdicts = judge(facts)
    assert {"python", "torch", "disk"} <= {v.name for v in verdicts}
    assert not {"name", "connection", "security", "address", *NEEDS_COORDINATOR} & {v.name for v in verdicts}
    assert skipped(facts, verdicts) == []


def test_what_the_coordinator_would_have_to_answer_is_named_when_it_does_not() -> None:
    facts = replace(FACTS, cluster=ClusterFacts("not-tried"), way=replace(WAY, connect_error="Connection refused"))
    verdicts = judge(facts)
    assert skipped(facts, verdicts) == list(NEEDS_COORDINATOR)
    assert "address" in {v.name for v in verdicts}, "what can still be checked is checked"


def test_nodes_are_not_missed_when_the_key_does_not_allow_to_ask() -> None:
    facts = replace(FACTS, cluster=replace(CLUSTER, nodes=None))
    assert skipped(facts, judge(facts)) == []


def test_exit_codes_and_their_order() -> None:
    bad = failed("a", "d", "do")
    refused = failed("b", "d", "do", exitcodes.REFUSED)
    unreachable = failed("c", "d", "do", exitcodes.UNREACHABLE)
    assert exit_code([passed("a", "d"), warned("b", "d", "do")]) == 0
    assert exit_code([bad]) == 1
    assert exit_code([bad, refused]) == 77
    assert exit_code([bad, refused, unreachable]) == 69


def test_who_does_not_pass_has_an_action_and_only_they() -> None:
    for wrong in ((Status.PASS, "do"), (Status.WARN, ""), (Status.FAIL, "")):
        with pytest.raises(AssertionError):
            Verdict("a", wrong[0], "d", wrong[1])


def test_text_has_each_check_its_action_and_a_sum() -> None:
    verdicts = [passed("short", "fine"), failed("longer-one", "bro\x1b[2Jken", "mend it")]
    lines = show.text(verdicts, ["nodes"]).splitlines()
    assert lines[0] == "PASS  short       fine"
    assert lines[1].startswith("FAIL  longer-one  bro\N{REPLACEMENT CHARACTER}")
    assert lines[2].strip() == "→ mend it"
    assert "nodes" in lines[4]
    assert lines[-1] == "1 PASS, 0 WARN, 1 FAIL"


def test_json_has_the_four_fields_of_each_check() -> None:
    document = show.document([warned("a", "b", "c")], [])
    assert document["checks"] == [{"name": "a", "status": "WARN", "detail": "b", "action": "c"}]
    assert document["ok"] is True


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("changed", "status", "action"),
    [
        ({}, Status.PASS, ""),
        ({"folder": None}, Status.FAIL, "--keys FOLDER with worker.key"),
        ({"folder": None, "local": True}, Status.PASS, ""),
        ({"folder": None, "declined": True}, Status.WARN, "use --keys"),
        ({"folder": None, "declined": True, "local": True}, Status.PASS, ""),
        ({"exists": False}, Status.FAIL, "--keys"),
        ({"problem": "x", "files": (KeyFile("coordinator.pub", 0o644),)}, Status.FAIL, "copy worker.key"),
        ({"problem": "x", "files": (KeyFile("worker.key", 0o640),)}, Status.FAIL, "chmod 600 keys/worker.key"),
        ({"problem": "x"}, Status.FAIL, "again"),
        ({"mode": 0o777}, Status.WARN, "chmod 700 keys"),
        ({"files": (*KEYS.files, KeyFile("user.key", 0o644))}, Status.WARN, "chmod 600 keys/user.key"),
        ({"files": (*KEYS.files, KeyFile("coordinator.key", 0o600))}, Status.WARN, "rm keys/coordinator.key"),
    ],
)
def test_keys(changed: dict[str, Any], status: Status, action: str) -> None:
    found = of_keys(**changed)
    assert found.status is status, found
    assert action in found.action
    assert found.code == (exitcodes.FAILED if status is Status.FAIL else 0)


def test_the_coordinators_key_may_be_on_its_own_host() -> None:
    keys = replace(KEYS, files=(*KEYS.files, KeyFile("coordinator.key", 0o600)))
    assert verdict(replace(FACTS, keys=keys, way=replace(WAY, source="10.0.0.1")), "keys").status is Status.PASS
    assert verdict(replace(FACTS, keys=keys, way=None, cluster=None), "keys").status is Status.PASS


def test_the_folder_of_keys_is_looked_at_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    new_keys(folder, {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")})
    facts, keys = look_keys.look(str(folder), False, False, "server")
    assert keys is not None
    assert (facts.problem, facts.mode, facts.own) == ("", 0o700, "server.key")
    assert KeyFile("coordinator.pub", 0o644) in facts.files
    (folder / "server.key").chmod(0o644)
    facts, keys = look_keys.look(str(folder), False, False, "server")
    assert keys is None
    assert "open to others" in facts.problem
    assert verdict(replace(FACTS, keys=facts), "keys").action == f"chmod 600 {folder}/server.key"


def test_a_key_whose_halves_do_not_belong_together_is_found_out(tmp_path: Path) -> None:
    new_keys(tmp_path, {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")})
    path = tmp_path / "user.key"
    path.write_text(re.sub(r'public = ".*"', lambda _: f'public = "{new_key_pair().public}"', path.read_text()))
    facts, keys = look_keys.look(str(tmp_path), False, False, "user")
    assert keys is None
    assert "damaged" in facts.problem


def test_a_user_with_one_named_key_needs_no_other(tmp_path: Path) -> None:
    add_key(tmp_path, "user", "alice", new_key_pair())
    assert look_keys.own_file(tmp_path, "user") == "user-alice.key"
    assert look_keys.own_file(tmp_path, "worker") == "worker.key"
    add_key(tmp_path, "user", "bob", new_key_pair())
    assert look_keys.own_file(tmp_path, "user") == "user.key"


def test_no_folder_of_keys(tmp_path: Path) -> None:
    facts, keys = look_keys.look(str(tmp_path / "none"), False, False, "user")
    assert keys is None
    assert not facts.exists


# ---------------------------------------------------------------- the way


@pytest.mark.parametrize(
    ("changed", "action"),
    [
        ({"addresses": (), "resolve_error": "Name or service not known"}, "DNS"),
        ({"addresses": (), "only_ipv6": True}, "IPv4"),
    ],
)
def test_a_name_without_an_address_is_unreachable(changed: dict[str, Any], action: str) -> None:
    found = of_way("name", cluster=ClusterFacts("not-tried"), source="", **changed)
    assert (found.status, found.code) == (Status.FAIL, exitcodes.UNREACHABLE)
    assert action in found.action


@pytest.mark.parametrize(
    ("changed", "action"),
    [
        ({"connect_error": "Connection refused", "mechanism": ""}, "start the coordinator"),
        ({"connect_error": "no answer within 10 s", "mechanism": ""}, "firewall"),
        ({"connect_error": "No route to host", "mechanism": ""}, "firewall"),
        ({"mechanism": ""}, "correct the port"),
        ({"mechanism": "", "silent": True}, "hangs or is stopped"),
    ],
)
def test_a_port_without_a_coordinator_is_unreachable(changed: dict[str, Any], action: str) -> None:
    found = of_way("connection", cluster=ClusterFacts("not-tried"), **changed)
    assert (found.status, found.code) == (Status.FAIL, exitcodes.UNREACHABLE)
    assert action in found.action


@pytest.mark.parametrize(
    ("mechanism", "folder", "outcome", "status", "code", "said"),
    [
        ("CURVE", "keys", "answered", Status.PASS, 0, "encrypted"),
        ("CURVE", "keys", "refused", Status.FAIL, 77, "put worker.pub"),
        ("CURVE", "keys", "wrong-server-key", Status.FAIL, 77, "copy coordinator.pub"),
        ("CURVE", "keys", "forbidden", Status.FAIL, 77, "key of this role"),
        ("CURVE", "keys", "not-tried", Status.FAIL, 1, "mend the keys"),
        ("CURVE", "keys", "silent", Status.FAIL, 69, "--timeout"),
        ("CURVE", "keys", "unreachable", Status.FAIL, 69, "--timeout"),
        ("CURVE", None, "not-tried", Status.FAIL, 77, "with --keys"),
        ("NULL", "keys", "not-tried", Status.FAIL, 77, "start the coordinator with --keys"),
        ("NULL", None, "answered", Status.WARN, 0, "start the coordinator with --keys"),
        ("NULL", None, "silent", Status.FAIL, 69, "--timeout"),
    ],
)
def test_security(mechanism: str, folder: str | None, outcome: str, status: Status, code: int, said: str) -> None:
    facts = replace(
        FACTS,
        keys=replace(KEYS, folder=folder),
        way=replace(WAY, mechanism=mechanism),
        cluster=replace(CLUSTER, outcome=outcome),
    )
    found = verdict(facts, "security")
    assert (found.status, found.code) == (status, code)
    assert said in found.action + found.detail


def test_a_local_coordinator_may_run_without_keys() -> None:
    facts = replace(FACTS, keys=KeysFacts(None, False, True), way=replace(WAY, mechanism="NULL"))
    assert verdict(facts, "security").status is Status.PASS


LOOPBACK = {"source": "127.0.0.1", "interface": Interface("lo", "127.0.0.1", 8)}


@pytest.mark.parametrize(
    ("changed", "role", "status", "action"),
    [
        ({}, "server", Status.PASS, ""),
        ({"interface": Interface("docker0", "10.0.0.7", 16)}, "server", Status.WARN, "--advertise"),
        ({"interface": Interface("docker0", "10.0.0.7", 16)}, "worker", Status.PASS, ""),
        (LOOPBACK, "server", Status.WARN, "--advertise"),
        (LOOPBACK, "user", Status.PASS, ""),
        ({"in_container": True}, "server", Status.PASS, ""),
        ({"in_container": True, "addresses": ("192.168.4.1",)}, "server", Status.WARN, "--network host"),
        ({"in_container": True, "interface": None}, "server", Status.WARN, "--network host"),
        ({"interface": None}, "server", Status.PASS, ""),
    ],
)
def test_address(changed: dict[str, Any], role: str, status: Status, action: str) -> None:
    found = of_way("address", role, **changed)
    assert found.status is status, found
    assert action in found.action
    assert str(changed.get("source", "10.0.0.7")) in found.detail


def test_loopback_is_well_while_nobody_else_has_joined() -> None:
    alone = replace(CLUSTER, nodes=(NODES[0], {**NODES[1], "host": "a"}, {**NODES[1], "host": "c", "state": "LOST"}))
    assert of_way("address", "server", alone, **LOOPBACK).status is Status.PASS
    assert of_way("address", "server", None, **LOOPBACK).status is Status.PASS


def test_shards_need_ports() -> None:
    assert "32768 to 60999" in of_way("ports").detail
    assert of_way("ports", bind_error="Cannot assign requested address").status is Status.FAIL
    assert of_way("ports", "worker", bind_error="Cannot assign requested address").status is Status.WARN
    assert "no port" in of_way("ports", "worker").detail


# ---------------------------------------------------------------- the coordinator and its nodes


def test_versions() -> None:
    assert of_cluster("version", facts={"version": "0.1.0"}).status is Status.PASS
    older = {"facts": {"version": "0.0.9"}}
    assert of_cluster("version", **older).status is Status.FAIL
    assert of_cluster("version", **older).action == "install downpour-ps 0.0.9 here"
    assert of_cluster("version", "user", **older).status is Status.WARN
    assert of_cluster("version", facts={}).status is Status.FAIL


@pytest.mark.parametrize(
    ("ahead_s", "error_s", "status", "said"),
    [
        (0.0, 0.001, Status.PASS, "within"),
        (-1.9, 0.0, Status.PASS, "within"),
        (2.5, 0.001, Status.WARN, "behind"),
        (-2.5, 0.001, Status.WARN, "ahead of"),
        (2.5, 1.0, Status.PASS, "within"),  # the way is too slow to know
    ],
)
def test_clocks(ahead_s: float, error_s: float, status: Status, said: str) -> None:
    found = of_cluster("clock", clock_ahead_s=ahead_s, clock_error_s=error_s)
    assert found.status is status
    assert said in found.detail


def test_round_trips_and_throughput_matter_to_those_who_train() -> None:
    slow: dict[str, Any] = {"round_trips_s": (0.03, 0.04, 9.0), "throughput": Throughput(3 << 20, 3.0)}
    assert of_cluster("round-trip", **slow).status is Status.WARN
    assert "40.00 ms" in of_cluster("round-trip", **slow).detail
    assert of_cluster("throughput", **slow).status is Status.WARN
    assert of_cluster("throughput", throughput=Throughput(0, 3.0)).status is Status.WARN
    for name in ("round-trip", "throughput"):
        assert of_cluster(name, "user", **slow).status is Status.PASS


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ((), "no host has joined"),
        (({**NODES[0], "state": "LOST"}, NODES[1]), "1 of 2 hosts do not answer: a-server"),
        (({**NODES[0], "version": "0.0.9"}, NODES[1]), "another version than the coordinator's 0.1.0: a-server"),
        (({**NODES[0], "address": "127.0.0.1"}, NODES[1]), "loopback"),
        ((NODES[0],), "no worker"),
        ((NODES[1],), "no server"),
    ],
)
def test_nodes_that_are_not_well(changed: tuple[dict[str, Any], ...], said: str) -> None:
    found = of_cluster("nodes", nodes=changed)
    assert found.status is Status.WARN
    assert said in found.detail


def test_nodes_that_are_well() -> None:
    assert of_cluster("nodes").detail == "1 server, 1 worker"
    one_host = ({**NODES[0], "address": "127.0.0.1"}, {**NODES[1], "host": "a"})
    assert of_cluster("nodes", nodes=one_host).status is Status.PASS
    many = tuple({**NODES[0], "node": f"n{i}", "state": "LOST"} for i in range(9))
    assert of_cluster("nodes", nodes=many).detail.endswith("n3 and 5 more")


# ---------------------------------------------------------------- the host


@pytest.mark.parametrize(
    ("name", "role", "changed", "status", "action"),
    [
        ("python", "user", {"python": "3.10.2"}, Status.FAIL, "3.11"),
        ("torch", "worker", {"torch": TorchFacts("ModuleNotFoundError: torch")}, Status.FAIL, "install torch"),
        ("torch", "user", {"torch": TorchFacts("ModuleNotFoundError: torch")}, Status.PASS, ""),
        ("torch", "server", {"torch": TorchFacts("", "2.5.1")}, Status.FAIL, "2.6"),
        ("torch", "user", {"torch": TorchFacts("", "2.5.1")}, Status.WARN, "2.6"),
        ("torch", "worker", {"gpus": 2}, Status.WARN, "torch with CUDA"),
        ("torch", "server", {"gpus": 2}, Status.PASS, ""),
        ("torch", "worker", {"gpus": 2, "torch": TorchFacts("", "2.9", "13.0", 1)}, Status.WARN, "nvidia-smi"),
        ("torch", "worker", {"gpus": 2, "torch": TorchFacts("", "2.9", "13.0", 2)}, Status.PASS, ""),
        ("torch", "worker", {"torch": TorchFacts("", "3.0.0")}, Status.PASS, ""),
        ("cores", "worker", {"omp_threads": "9"}, Status.WARN, "set it to 8"),
        ("cores", "worker", {"omp_threads": "8"}, Status.PASS, ""),
        ("cores", "worker", {"omp_threads": "many"}, Status.PASS, ""),
        ("memory", "worker", {"memory_bytes": 2 * GIB}, Status.WARN, "--slots 4"),
        ("memory", "server", {"memory_bytes": 2 * GIB}, Status.PASS, ""),
        ("memory", "server", {"memory_bytes": GIB // 4}, Status.WARN, "512 MiB"),
        ("memory", "user", {"memory_bytes": GIB // 4}, Status.PASS, ""),
        ("memory", "worker", {"memory_bytes": 0}, Status.PASS, ""),
        ("open-files", "worker", {"files_hard": 1024}, Status.WARN, "LimitNOFILE"),
        ("open-files", "worker", {"files_hard": -1}, Status.PASS, ""),
        ("shared-memory", "server", {"shared_memory_error": "Permission denied"}, Status.WARN, "/proc"),
        ("shared-memory", "user", {"shared_memory_error": "Permission denied"}, Status.PASS, ""),
        ("dev-shm", "worker", {"shm_bytes": 64 << 20}, Status.WARN, "--shm-size"),
        ("dev-shm", "worker", {"shm_bytes": -1}, Status.WARN, "--shm-size"),
        ("dev-shm", "server", {"shm_bytes": 64 << 20}, Status.PASS, ""),
        ("disk", "server", {"disks": (DiskFacts("/d", GIB, True),)}, Status.WARN, "make room"),
        ("disk", "server", {"disks": (DiskFacts("/d", 1 << 20, True),)}, Status.FAIL, "--data-dir"),
        ("disk", "server", {"disks": (DiskFacts("/d", 9 * GIB, False),)}, Status.FAIL, "--data-dir"),
    ],
)
def test_host(name: str, role: str, changed: dict[str, Any], status: Status, action: str) -> None:
    found = of_host(name, role, **changed)
    assert found.status is status, found
    assert action in found.action


def test_limits_of_control_groups_are_said() -> None:
    assert of_host("cores", cores=2).detail.startswith("2 cores of 8 (affinity or control group)")
    assert of_host("memory", memory_bytes=8 * GIB).detail == "8 GiB of 32 GiB (control group)"


# ---------------------------------------------------------------- gathering


def test_this_host_can_be_looked_at(tmp_path: Path) -> None:
    facts = look_host.look(str(tmp_path / "not" / "there" / "yet"))
    assert facts.cores >= 1
    assert facts.torch.error == ""
    assert facts.torch.version.startswith("2.")
    assert facts.shared_memory_error == ""
    assert facts.disks[0].path == str(tmp_path / "not/there/yet")
    assert facts.disks[0].writable


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("import os; os.abort()", "the interpreter ended with -6"),
        ("print('hello')", "JSONDecodeError"),
        ("pass", "IndexError"),
    ],
)
def test_a_broken_torch_breaks_nothing_else(code: str, error: str) -> None:
    assert look_host.look_at_torch(code).error.startswith(error)


def test_a_torch_that_hangs_is_given_up() -> None:
    assert look_host.look_at_torch("import threading; threading.Event().wait()", 0.1).error.startswith("that took more")


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not look_host.look_at_disk(str(tmp_path / "file" / "below")).writable


def test_interfaces_have_addresses() -> None:
    assert Interface("lo", "127.0.0.1", 8) in look_way.interfaces()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"


@pytest.mark.parametrize(
    ("said", "mechanism"),
    [
        (GREETING + b"CURVE".ljust(20, b"\0") + bytes(32), "CURVE"),
        (GREETING + b"NULL".ljust(20, b"\0") + bytes(32), "NULL"),
        (GREETING + b"NULL".ljust(20, b"\0"), ""),
        (b"HTTP/1.1 400 Bad Request\r\n".ljust(64), ""),
        (b"", ""),
    ],
)
def test_a_listener_is_known_by_its_greeting(said: bytes, mechanism: str) -> None:
    assert look_way.mechanism_of(said) == mechanism


def listener(serve: Callable[[socket.socket], object]) -> tuple[int, threading.Thread]:
    """A port where ``serve`` gets the first connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server, server.accept()[0] as connection:
            serve(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return server.getsockname()[1], thread


def test_a_web_server_is_no_coordinator() -> None:
    port, thread = listener(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    way = look_way.look("127.0.0.1", port, 5.0)
    thread.join()
    assert (way.connect_error, way.mechanism, way.source) == ("", "", "127.0.0.1")
    assert way.interface == Interface("lo", "127.0.0.1", 8)


def test_who_hangs_up_is_no_coordinator_and_who_says_nothing_may_be_one() -> None:
    port, thread = listener(lambda sock: None)
    assert not look_way.look("127.0.0.1", port, 5.0).silent
    thread.join()
    over = threading.Event()
    port, thread = listener(lambda sock: bool(over.wait()))
    assert look_way.look("127.0.0.1", port, 0.1).silent
    over.set()
    thread.join()


def test_a_name_that_nobody_knows() -> None:
    way = look_way.look("nowhere.invalid", 7070, 5.0)
    assert way.addresses == ()
    assert way.resolve_error


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"join": "head"}, "--join head: expected HOST:PORT"),
        ({"join": "ipc:///tmp/x"}, "--join ipc:///tmp/x: expected HOST:PORT"),
        ({"role": "boss"}, "--role boss"),
        ({"security": "tls"}, "--security tls"),
        ({"security": "none", "keys": "keys"}, "exclude each other"),
        ({"security": "curve"}, "give the folder of keys"),
    ],
)
def test_values_that_make_no_sense_are_errors_of_usage(changed: dict[str, str], problem: str) -> None:
    options = replace(Options("head:7070", "", "", "user", "", 1.0), **changed)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        gather(options, {})


# ---------------------------------------------------------------- the conversation, without sockets


class Coordinator:
    """A transport whose other side answers at once; ``trip_s`` of the clock goes by for each message."""

    def __init__(self, trip_s: float, clock_ahead_s: float = 0.0, answers: bool = True, trouble: str = "") -> None:
        self.now_s, self.trip_s, self.ahead_s = 0.0, trip_s, clock_ahead_s
        self.answers, self._trouble = answers, trouble
        self.malformed = 0
        self.sent: list[Message] = []
        self._waiting: list[Message] = []
        self._address = ""

    def send(self, server: str, message: Message) -> None:
        self._address = server
        self.sent.append(message)
        self._waiting.append(message)

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        if not self.answers or not self._waiting:
            self.now_s += timeout_s
            return []
        message = self._waiting.pop(0)
        self.now_s += self.trip_s / 2
        there_s = 1000.0 + self.now_s + self.ahead_s
        self.now_s += self.trip_s / 2
        return [(self._address, self.answer(message, there_s))]

    def answer(self, message: Message, there_s: float) -> Message:
        match message:
            case Ping():
                return Pong(message.request, {"version": "0.1.0", "time_s": there_s}, message.payload)
            case ListNodes():
                return Reply(message.request, {"nodes": list(NODES), "coordinator": {}})
        raise AssertionError(message)

    def trouble(self, server: str) -> str:
        return self._trouble

    def wake(self) -> None:
        raise AssertionError("nobody waits elsewhere")

    def close(self) -> None:
        self._waiting.clear()


def talk(there: Coordinator, may_list: bool = True) -> ClusterFacts:
    def connect(where: Access) -> Coordinator:
        assert where.keys_dir is None
        return there

    return look_cluster.look(
        "tcp://10.0.0.1:7070",
        None,
        may_list,
        10.0,
        connect=connect,
        now=lambda: there.now_s,
        wall=lambda: 1000.0 + there.now_s,
    )


def test_the_conversation_measures_trips_clock_and_throughput() -> None:
    there = Coordinator(0.001, clock_ahead_s=5.0)
    found = talk(there)
    assert found.outcome == "answered"
    assert found.facts["version"] == "0.1.0"
    assert len(found.round_trips_s) == 20
    assert found.round_trips_s == pytest.approx([0.001] * 20)
    assert found.clock_ahead_s == pytest.approx(5.0)
    assert found.clock_error_s == pytest.approx(0.0005)
    assert found.nodes == NODES
    assert found.throughput is not None
    assert found.throughput.nbytes == 64 << 20
    assert found.throughput.seconds == pytest.approx(0.064)


def test_an_agent_does_not_ask_for_nodes() -> None:
    there = Coordinator(0.001)
    assert talk(there, may_list=False).nodes is None
    assert not [m for m in there.sent if isinstance(m, ListNodes)]


def test_a_slow_way_gets_small_payloads_and_little_time() -> None:
    there = Coordinator(0.2)
    found = talk(there)
    sizes = {len(m.payload) for m in there.sent if isinstance(m, Ping)}
    assert sizes == {0, look_cluster.SMALL_BYTES}
    assert found.throughput is not None
    assert 0 < found.throughput.nbytes < 64 << 20
    assert found.throughput.seconds <= look_cluster.MOST_S + 0.25


def test_a_way_that_swallows_large_messages_is_given_up() -> None:
    class Swallows(Coordinator):
        def send(self, server: str, message: Message) -> None:
            if not isinstance(message, Ping) or len(message.payload) <= look_cluster.SMALL_BYTES:
                super().send(server, message)

    found = talk(Swallows(0.001))
    assert found.outcome == "answered"
    assert found.throughput is not None
    assert found.throughput.nbytes == 0
    assert found.throughput.seconds <= look_cluster.MOST_S + 0.25


@pytest.mark.parametrize(
    ("trouble", "outcome"),
    [
        ("refused", "refused"),
        ("wrong-server-key", "wrong-server-key"),
        ("unreachable", "unreachable"),
        ("", "silent"),
    ],
)
def test_why_there_is_no_answer(trouble: str, outcome: str) -> None:
    assert talk(Coordinator(0.001, answers=False, trouble=trouble)).outcome == outcome


def test_a_key_that_may_not_even_ping() -> None:
    class Forbids(Coordinator):
        def answer(self, message: Message, there_s: float) -> Message:
            assert isinstance(message, Ping)
            return Refused(message.request, Refusal.FORBIDDEN, "no")

    assert talk(Forbids(0.001)).outcome == "forbidden"


def test_a_coordinator_that_goes_away_meanwhile_leaves_what_is_known() -> None:
    class Leaves(Coordinator):
        def send(self, server: str, message: Message) -> None:
            self.answers = self.answers and not isinstance(message, ListNodes)
            super().send(server, message)

    found = talk(Leaves(0.001))
    assert (found.outcome, found.nodes, found.throughput) == ("answered", None, None)
    facts = replace(FACTS, role="user", cluster=found)
    assert skipped(facts, judge(facts)) == ["throughput", "nodes"]


def test_without_an_address_nobody_is_asked() -> None:
    facts = gather(Options("", "", "", "user", "", 1.0), {})
    assert (facts.way, facts.cluster, facts.keys) == (None, None, None)
