"""The conversation between a user and a coordinator: repeats, deadlines, refusals, addresses and keys."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from job_kit import ADDRESS, FakeCoordinator, job_document, line_to, served

from downpour.jobs.access import Access, access, is_local, parse_address
from downpour.jobs.client import ClusterClient
from downpour.jobs.errors import CoordinatorUnreachable, Forbidden, JobRefused, Unknown
from downpour.jobs.exchange import REPEAT_S, Exchange
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.keys import KeyPair, ServerKeys, add_key, authorized, new_keys
from downpour_common.messages import (
    Ack,
    DescribeJob,
    FileData,
    GetFile,
    Heartbeat,
    ListFiles,
    ListJobs,
    ListNodes,
    Reply,
)
from downpour_common.transport.zeromq import new_key_pair

# ---------------------------------------------------------------- exchange


def test_a_request_is_due_at_once_and_again_with_the_same_number_until_it_is_answered() -> None:
    exchange = Exchange(10)
    request = ListJobs(exchange.number())
    assert request.request == 11
    exchange.add(request, 0.0)
    assert exchange.due(0.0) == [request]
    assert exchange.due(REPEAT_S - 0.1) == []
    assert exchange.wait_s(REPEAT_S - 0.5) == 0.5
    assert exchange.due(REPEAT_S) == [request]
    assert exchange.take(Reply(11, {}), 3.0) is request
    assert exchange.due(100.0) == []
    assert exchange.silent_s(100.0) == 0.0
    assert exchange.wait_s(0.0) == float("inf")


def test_answers_to_what_is_not_open_are_dropped() -> None:
    exchange = Exchange(0)
    exchange.add(ListJobs(1), 0.0)
    assert exchange.take(Reply(7, {}), 1.0) is None
    assert exchange.take(Heartbeat("n", "i", {}), 1.0) is None
    assert exchange.silent_s(1.0) == 1.0
    assert exchange.take(Reply(1, {}), 1.0) is not None
    assert exchange.take(Reply(1, {}), 1.0) is None, "the answer to a repeat"


def test_while_answers_come_nothing_is_repeated_so_that_a_slow_link_carries_everything_once() -> None:
    exchange = Exchange(0)
    for number in (1, 2):
        exchange.add(ListJobs(number), 0.0)
    assert len(exchange.due(0.0)) == 2
    exchange.take(Reply(1, {}), 1.9)
    assert exchange.due(2.1) == []
    assert exchange.silent_s(2.4) == pytest.approx(0.5)
    assert [r.request for r in exchange.due(3.9)] == [2]


# ---------------------------------------------------------------- client


def test_an_answer_that_was_lost_is_asked_for_again() -> None:
    line = line_to(job_document())
    line.deaf = 2
    with line.client() as client:
        assert client.describe("digits")["job"] == "digits-3f2a9c"
    numbers = [message.request for message in line.coordinator.of(DescribeJob)]
    assert len(numbers) == 3
    assert len(set(numbers)) == 1
    assert line.clock.now_s == pytest.approx(1000 + 2 * REPEAT_S, abs=0.6)
    assert line.closed == 1


def test_a_coordinator_may_be_restarted_in_between() -> None:
    line = line_to(job_document())
    line.cut = True

    def back() -> None:
        line.cut = False

    line.clock.at.append((1007.0, back))
    with line.client() as client:
        assert len(client.jobs()) == 1


@pytest.mark.parametrize(("problem", "found"), [("", "no coordinator answers at"), ("unreachable", "nothing listens")])
def test_without_an_answer_the_error_says_where_and_what_to_do(problem: str, found: str) -> None:
    line = line_to()
    line.cut, line.problem = True, problem
    silences: list[float] = []
    with line.client(5.0) as client:
        client.on_silence = silences.append
        with pytest.raises(CoordinatorUnreachable, match=found) as caught:
            client.jobs()
        assert caught.value.after_s == pytest.approx(5.0, abs=0.3)
        assert caught.value.address == ADDRESS
        for word in (
            "127.0.0.1:7000 (tried for 5 s)",
            "downpour coordinator start",
            "--join",
            "firewalls",
            "--timeout",
        ):
            assert word in str(caught.value)
        assert silences == sorted(silences)
        assert len(silences) > 5
        line.cut = False
        assert client.jobs() == [], "the client can still be used"


def test_a_long_silence_opens_a_new_connection() -> None:
    line = line_to()
    line.cut = True

    def back() -> None:
        line.cut = False

    line.clock.at.append((1025.0, back))
    with line.client(60.0) as client:
        assert client.jobs() == []
    assert line.opened == 3
    assert line.closed == 3


@pytest.mark.parametrize(
    ("problem", "keys", "text"),
    [
        ("refused", "keys", r"does not accept the key .*keys/user\.key; have its administrator authorize"),
        ("refused", None, r"127\.0\.0\.1:7000 asks for a key; give --keys FOLDER, or set DOWNPOUR_KEYS"),
        (
            "wrong-server-key",
            "keys",
            r"cannot prove to have the key .*keys/coordinator\.pub: it is another coordinator",
        ),
    ],
)
def test_refused_keys_are_told_apart_from_silence(problem: str, keys: str | None, text: str, tmp_path: Path) -> None:
    line = line_to()
    line.cut, line.problem = True, problem
    folder = None if keys is None else tmp_path / keys
    if folder is not None:
        folder.mkdir()
    client = ClusterClient(ADDRESS, folder, connect=line.connect, now=line.clock.now)
    with client, pytest.raises(Forbidden, match=text):
        client.jobs()
    assert line.clock.now_s < 1003


def test_a_connection_that_breaks_in_its_handshake_is_not_a_refusal() -> None:
    """A coordinator that is being killed or started can look so for a moment."""
    line = line_to()
    line.cut, line.problem = True, "refused"

    def back() -> None:
        line.cut, line.problem = False, ""

    line.clock.at.append((1000.6, back))
    with line.client() as client:
        assert client.jobs() == []


def test_refusals_become_errors_by_their_code() -> None:
    line = line_to()
    with line.client() as client:
        with pytest.raises(Unknown, match=r"^no job digits; `downpour list` shows the jobs$") as job:
            client.describe("digits")
        assert (job.value.kind, job.value.name) == ("job", "digits")
        with pytest.raises(Unknown, match=r"^no node n7; `downpour nodes` lists them$") as node:
            client.drain("n7")
        assert (node.value.kind, node.value.name) == ("node", "n7")
        with pytest.raises(Unknown, match=r"^no file x$") as file:
            client.ask(FileData, GetFile, "job", "x", 0, 1)
        assert file.value.kind == "file"
        line.coordinator.refuse = {ListJobs: ("forbidden", ""), ListNodes: ("unusable", "one line")}
        with pytest.raises(Forbidden, match="this key does not allow that"):
            client.jobs()
        with pytest.raises(JobRefused, match=r"^one line$") as refused:
            client.nodes()
        assert refused.value.code == "unusable"


def test_not_ready_is_asked_again_until_it_is() -> None:
    line = line_to(job_document())
    line.coordinator.refuse = {ListJobs: ("not-ready", "starting")}

    def ready() -> None:
        line.coordinator.refuse = {}

    line.clock.at.append((1005.0, ready))
    with line.client() as client:
        assert len(client.jobs()) == 1
    assert len(line.coordinator.of(ListJobs)) == 4


def test_several_requests_are_in_flight_and_answers_come_in_their_order() -> None:
    line = line_to()
    line.coordinator.files = {f"f{i}": b"%d" % i for i in range(30)}
    in_flight: list[int] = []
    line.coordinator.before = lambda _m: in_flight.append(len(line.coordinator.heard))
    with line.client() as client:
        answers = client.ask_all(FileData, ((GetFile, "job", f"f{i}", 0, 10) for i in range(30)))
        assert bytes(next(answers).payload) == b"0"
        assert len(line.coordinator.heard) == 8
        assert [bytes(a.payload) for a in answers] == [b"%d" % i for i in range(1, 30)]


def test_an_answer_of_another_kind_is_an_error() -> None:
    line = line_to()
    with line.client() as client, pytest.raises(ProtocolError, match="answered ListJobs with Reply"):
        client.ask(Ack, ListJobs)


def test_files_that_are_no_pairs_are_an_error() -> None:
    line = line_to(job_document())

    line.coordinator.answer = lambda m: Reply(m.request, {"files": [["only"]]})  # type: ignore[method-assign]
    with line.client() as client, pytest.raises(ProtocolError, match="ListFiles"):
        client.files("digits")


# ---------------------------------------------------------------- address and keys


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("node-a:7000", "tcp://node-a:7000"),
        ("tcp://10.0.0.1:07000", "tcp://10.0.0.1:7000"),
        ("[::1]:7000", "tcp://[::1]:7000"),
        ("ipc:///run/downpour", "ipc:///run/downpour"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "node", ":7000", "node:", "node:x", "node:0", "node:65536", "a b:1", "::1:5", "ipc://"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse_address(text)


def test_what_is_local() -> None:
    local = ["tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://[::1]:1", "tcp://localhost:1", "ipc:///x"]
    assert [is_local(address) for address in local] == [True] * 5
    assert not any(map(is_local, ["tcp://10.0.0.1:1", "tcp://localhost.evil.org:1", "tcp://[fe80::1]:1"]))


def test_arguments_beat_the_environment(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    environment = {"DOWNPOUR_COORDINATOR": "a:1", "DOWNPOUR_KEYS": str(one)}
    assert access(environment=environment) == Access("tcp://a:1", str(one))
    assert access("b:2", other, environment=environment) == Access("tcp://b:2", str(other))
    assert access(security="none", environment=environment) == Access("tcp://a:1", None)


def test_another_host_without_keys_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"--join node-a:7000: another host is joined with keys only; .*--keys"):
        access("node-a:7000", environment={})
    assert access("node-a:7000", security="none", environment={}).keys_dir is None
    assert access("127.0.0.1:7000", environment={}).keys_dir is None


def test_all_problems_of_access_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        access(None, "/nowhere", "tls", environment={})
    assert [p.split(";")[0] for p in caught.value.problems] == [
        "--security tls: expected curve or none",
        "which cluster? give --join HOST:PORT, or set DOWNPOUR_COORDINATOR",
        "--keys /nowhere: no such folder",
    ]
    with pytest.raises(ConfigError, match="--security curve: needs keys"):
        access("127.0.0.1:1", security="curve", environment={})


def test_a_named_key_is_found_when_it_is_the_only_one(tmp_path: Path) -> None:
    pairs = {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")}
    new_keys(tmp_path, pairs)
    where = Access("tcp://a:1", str(tmp_path))
    keys = where.keys()
    assert keys is not None
    assert keys.pair == pairs["user"]
    assert keys.server_at("tcp://a:1") == pairs["coordinator"].public
    alice: KeyPair = new_key_pair()
    add_key(tmp_path, "user", "alice", alice)
    assert where.keys() == keys, "user.key comes first"
    (tmp_path / "user.key").unlink()
    named = where.keys()
    assert named is not None
    assert named.pair == alice
    assert where.key_file() == str(tmp_path / "user-alice.key")
    (tmp_path / "user-alice.key").unlink()
    with pytest.raises(ConfigError, match=r"user\.key is missing"):
        where.keys()


# ---------------------------------------------------------------- over sockets


def test_over_zeromq_with_keys(tmp_path: Path) -> None:
    pairs = {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")}
    new_keys(tmp_path, pairs)
    coordinator = FakeCoordinator(job_document())
    coordinator.files = {"logs/worker-0.log": b"x" * 3_000_000}
    with served(coordinator, ServerKeys(pairs["coordinator"], authorized(tmp_path))) as address:
        with ClusterClient(address, tmp_path) as client:
            assert client.describe("digits")["state"] == "RUNNING"
            assert client.files("digits") == [("logs/worker-0.log", 3_000_000)]
            data = client.ask(FileData, GetFile, "digits-3f2a9c", "logs/worker-0.log", 5, 1 << 20)
            assert len(data.payload) == 1 << 20
        assert len(coordinator.of(ListFiles)) == 1


def test_over_zeromq_a_key_that_is_not_authorized_is_refused(tmp_path: Path) -> None:
    pairs = {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")}
    new_keys(tmp_path, pairs)
    with served(FakeCoordinator(), ServerKeys(pairs["coordinator"], {})) as address:
        with ClusterClient(address, tmp_path) as client, pytest.raises(Forbidden, match=r"does not accept the key"):
            client.jobs()
        with ClusterClient(address) as client, pytest.raises(Forbidden, match="asks for a key"):
            client.jobs()


def test_over_zeromq_another_coordinators_key_is_noticed(tmp_path: Path) -> None:
    pairs = {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")}
    new_keys(tmp_path, pairs)
    with (
        served(FakeCoordinator(), ServerKeys(new_key_pair(), authorized(tmp_path))) as address,
        ClusterClient(address, tmp_path) as client,
        pytest.raises(Forbidden, match="cannot prove to have the key"),
    ):
        client.jobs()


@pytest.mark.parametrize("with_keys", [False, True])
def test_over_zeromq_a_coordinator_may_be_restarted(with_keys: bool, tmp_path: Path) -> None:
    keys = None
    if with_keys:
        pairs = {role: new_key_pair() for role in ("coordinator", "server", "worker", "user")}
        new_keys(tmp_path, pairs)
        keys = ServerKeys(pairs["coordinator"], authorized(tmp_path))
    coordinator = FakeCoordinator(job_document())
    with ExitStack() as stack:
        with served(coordinator, keys) as address:
            client = stack.enter_context(ClusterClient(address, tmp_path if with_keys else None, timeout_s=30.0))
            assert len(client.jobs()) == 1

        def start(seconds: float) -> None:
            client.on_silence = None
            stack.enter_context(served(coordinator, keys, address))

        client.on_silence = start
        assert len(client.jobs()) == 1
        assert client.on_silence is None, "it was away"
