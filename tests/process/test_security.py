"""Attacks on real daemons with keys: who has no business there gets nothing, changes nothing and stops nobody."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import zmq
from cluster_kit import PATIENCE_S, SCRIPTS, Cluster, environment_of, until

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.keys import ClientKeys, KeyPair, add_key, load_pair, load_public
from downpour_common.messages import Message, Request
from downpour_common.transport.zeromq import MAX_FRAME_BYTES, ZmqClient, new_key_pair

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

AGENTS: dict[str, tuple[str, ...]] = {"s1": ("server",), "w1": ("worker", "--slots", "2")}
ENDLESS = 1 << 30
ELSEWHERE = "192.0.2.1"
"""An address for documentation (RFC 5737); nothing is sent there, since each command must refuse before."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with two users, whose coordinator is a target from now on."""
    with Cluster(tmp_path_factory.mktemp("target")) as made:
        assert made.keys is not None
        add_key(made.keys / "all", "user", "mallory", new_key_pair())
        made.start_coordinator("--no-fsync")
        made.start_agents(AGENTS)
        yield made


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The target. Whatever a test did to it, it serves who may come in, its agents are there, and no job is left."""
    yield running
    running.show()
    running.cancel_all()
    for daemon in (running.coordinator, *running.agents.values()):
        assert daemon is not None
        assert daemon.process.poll() is None, daemon.text
        assert "Traceback" not in daemon.text
    assert {running.node(name)["state"] for name in AGENTS} == {"READY"}


class Party:
    """Somebody with a key pair who talks to the coordinator message by message."""

    def __init__(self, cluster: Cluster, keys: ClientKeys | None, address: str = "") -> None:
        self.address = address or f"tcp://{cluster.address}"
        self._client = ZmqClient(wire.CONTROL_HEADER_LIMIT, keys, watch=True)
        self._number = secrets.randbits(60)

    def close(self) -> None:
        self._client.close()

    def tell(self, message: Message) -> None:
        """Send, and expect nothing."""
        self._client.send(self.address, message)

    def ask(self, kind: type[Request], *fields: Any) -> Message:
        """Send a request and wait for its answer."""
        self._number += 1
        self._client.send(self.address, kind(self._number, *fields))
        answers: list[Message] = []

        def look() -> bool:
            answers.extend(a for _, a in self._client.poll(0.05) if getattr(a, "request", 0) == self._number)
            return bool(answers)

        until(look, f"answer to {kind.__name__}")
        return answers[0]

    def refusal(self, kind: type[Request], *fields: Any) -> str:
        """The code with which a request is refused."""
        answer = self.ask(kind, *fields)
        assert isinstance(answer, m.Refused), answer
        return answer.code

    def heard(self) -> list[Message]:
        """What has come without being asked for."""
        return [message for _, message in self._client.poll(0.05)]

    def turned_away(self, trouble: str) -> None:
        """Try until it is clear that nothing will be answered, and why."""

        def look() -> bool:
            self.tell(m.Ping(1, b""))
            assert self.heard() == []
            return self._client.trouble(self.address) == trouble

        until(look, f"{trouble!r} (it says {self._client.trouble(self.address)!r})")


@contextmanager
def party(
    cluster: Cluster, role: str, name: str = "", pair: KeyPair | None = None, address: str = ""
) -> Iterator[Party]:
    """Somebody with the key of a role, or with ``pair``; the role ``""`` has no key."""
    assert cluster.keys is not None
    folder = cluster.keys / "all"
    keys = None
    if role:
        keys = ClientKeys(pair or load_pair(folder, role, name), {}, load_public(folder, "coordinator"))
    made = Party(cluster, keys, address)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def job_party(cluster: Cluster, keys: dict[str, Any], address: str, server: str) -> Iterator[Party]:
    """Somebody with a job's own key, who expects the public key ``server`` at ``address``."""
    made = Party(cluster, ClientKeys(KeyPair(*keys["job"]), {}, server), address)
    try:
        yield made
    finally:
        made.close()


def train(cluster: Cluster, folder: Path, **fields: Any) -> str:
    """A job that trains until it is cancelled."""
    folder.mkdir()
    script = Path(shutil.copy(SCRIPTS / "numbered.py", folder))
    job = cluster.submit(script, folder / "notes", "--steps", ENDLESS, "--slow", 0.05, **fields)
    cluster.running(job)
    return job


def context_of(cluster: Cluster, job: str) -> dict[str, Any]:
    """What the job's script can read in its own environment."""
    text = environment_of(cluster.processes(job)["worker/0"])["DOWNPOUR_WORKER"]
    context = json.loads(text)
    assert isinstance(context, dict)
    return context


def listening(pid: int) -> str:
    """Where the process listens on TCP."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            return f"127.0.0.1:{int(fields[1].rpartition(':')[2], 16)}"
    raise AssertionError("listens nowhere")


def pack(files: dict[str, bytes]) -> tuple[str, bytes]:
    """Digest and bytes of a bundle, whatever the files are called."""
    header = json.dumps([[path, len(data), False] for path, data in files.items()], separators=(",", ":")).encode()
    data = b"DPBUND01" + struct.pack("<Q", len(header)) + header + b"".join(files.values())
    return hashlib.sha256(data).hexdigest(), data


def spec(name: str = "attack", script: str = "train.py") -> dict[str, Any]:
    """A document for SubmitJob."""
    return {"spec": {"name": name, "script": script, "folder": ".", "workers": 1, "shards": 1}}


# ---------------------------------------------------------------- keys of other roles


@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_hosts_key_is_no_users_key(cluster: Cluster, role: str) -> None:
    digest, data = pack({"train.py": b"print(1)"})
    with party(cluster, role) as agent:
        assert isinstance(agent.ask(m.Ping, b"still"), m.Pong)
        assert agent.refusal(m.PutBundle, digest, len(data), 0, data) == "forbidden"
        assert agent.refusal(m.SubmitJob, "0" * 32, digest, spec()) == "forbidden"
        assert agent.refusal(m.ListJobs) == "forbidden"
        assert agent.refusal(m.CancelJob, "any") == "forbidden"
        assert agent.refusal(m.DrainNode, "w1", False) == "forbidden"
        assert agent.refusal(m.GetFile, "any", "logs/worker-0.log", 0, 10) == "forbidden"
    assert not (cluster.folder / "data-coordinator" / "bundles" / digest).exists()


def test_a_workers_key_makes_no_server_and_takes_nobodys_place(cluster: Cluster) -> None:
    facts = {"host": "h", "address": "127.0.0.1", "cores": 1, "memory_bytes": 1 << 40, "gpus": 0, "labels": {}}
    facts |= {"slots": 9, "version": version("downpour-ps"), "boot": "b", "time_s": 0.0, "python": "3", "platform": "x"}
    with party(cluster, "worker") as worker:
        assert worker.refusal(m.RegisterNode, "s9", "server", "i", facts) == "forbidden"
        assert worker.refusal(m.RegisterNode, "s1", "worker", "i", facts) == "unusable"
        assert worker.refusal(m.RegisterNode, "w1", "worker", "i", facts) == "not-ready"  # its agent lives
        assert worker.refusal(m.RegisterNode, "../w", "worker", "i", facts) == "unusable"
        assert worker.refusal(m.RegisterNode, "w9", "worker", "i", {**facts, "slots": "many"}) == "unusable"
        worker.tell(m.Heartbeat("s1", "i", {"processes": []}))
        until(lambda: [type(x).__name__ for x in worker.heard()] == ["WhoAreYou"], "question who that is")
        assert worker.refusal(m.LogData, "w1", "i", "job", "server", 0, 0, 0, b"x") == "forbidden"
        assert worker.refusal(m.LogData, "w1", "i", "job", "worker", 0, 0, 0, b"x") in ("unknown", "not-ready")
    assert {n["node"] for n in cluster.ask(lambda client: client.nodes())["nodes"]} == set(AGENTS)


# ---------------------------------------------------------------- a job's own key


def test_what_a_script_finds_in_its_environment_opens_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    mine = train(cluster, tmp_path / "mine", name="mine")
    other = train(cluster, tmp_path / "other", name="other")
    context = context_of(cluster, mine)
    keys = context["keys"]
    assert "shard_secret" not in keys
    epoch, clock = cluster.describe(other)["processes"][0]["epoch"], cluster.describe(other)["clock"]
    with job_party(cluster, keys, context["coordinator"], keys["coordinator"]) as script:
        assert script.refusal(m.SubmitJob, "0" * 32, "0" * 64, spec()) == "forbidden"
        assert script.refusal(m.PutBundle, "0" * 64, 1, 0, b"x") == "forbidden"
        assert script.refusal(m.CancelJob, other) == "forbidden"
        assert script.refusal(m.ListJobs) == "forbidden"
        assert script.refusal(m.ListNodes) == "forbidden"
        for job in (mine, other):
            assert script.refusal(m.ListFiles, job) == "forbidden"
            assert script.refusal(m.GetFile, job, "bundle", 0, 100) == "forbidden"
            assert script.refusal(m.GetFile, job, "logs/worker-0.log", 0, 100) == "forbidden"
        assert script.refusal(m.TakeLease, other, 0, epoch, 0, 0, 100, 1, "", ()) == "forbidden"
        assert script.refusal(m.Goodbye, other, 0, epoch, True, 0) == "forbidden"
        script.tell(m.ReportFailure(other, 0, epoch, "told by another", ""))
        script.tell(m.Progress(other, 0, epoch, 1 << 40, 0, 0, 0, 0, 0, 0, 0.0))
        script.tell(m.ShardReport(other, 0, 0, {}))
        part = (other, 0, 0, 1, "shard-0.safetensors", 0, b"x")
        assert script.refusal(m.SnapshotPart, *part) == "forbidden"
        cluster.wait(other, lambda d: clock + 5 < d["clock"] < 1 << 30, "progress, unimpressed")
        cluster.ask(lambda client: client.cancel(mine))
        cluster.ended(mine, "CANCELLED")
    with job_party(cluster, keys, context["coordinator"], keys["coordinator"]) as script:
        script.turned_away("refused")  # the key of a job that is over is worth nothing


def test_a_job_cannot_reach_the_shards_of_another(cluster: Cluster, tmp_path: Path) -> None:
    victim = train(cluster, tmp_path / "victim", name="victim")
    thief = train(cluster, tmp_path / "thief", name="thief")
    keys, stolen = context_of(cluster, thief)["keys"], context_of(cluster, victim)["keys"]["shards"]
    shard = f"tcp://{listening(cluster.processes(victim)['server/0'])}"
    with job_party(cluster, keys, shard, keys["shards"]) as script:
        script.turned_away("wrong-server-key")
    with job_party(cluster, keys, shard, stolen) as script:
        script.turned_away("refused")
    with party(cluster, "user", address=shard) as user:
        user.turned_away("wrong-server-key")
    with party(cluster, "", address=shard) as nobody:
        nobody.turned_away("refused")
    clock = cluster.describe(victim)["clock"]
    cluster.wait(victim, lambda d: d["clock"] > clock, "progress")


# ---------------------------------------------------------------- no key, no protocol


def test_no_key_and_unknown_keys_are_turned_away(cluster: Cluster) -> None:
    with party(cluster, "") as nobody:
        nobody.turned_away("refused")
    with party(cluster, "user", pair=new_key_pair()) as stranger:
        stranger.turned_away("refused")
    assert cluster.keys is not None
    with party(cluster, "user", pair=load_pair(cluster.keys / "all", "coordinator")) as twin:
        twin.turned_away("refused")


def raw(address: str) -> socket.socket:
    """A TCP connection."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


GREETING = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + b"\0" * 31


def test_garbage_and_half_handshakes_stop_nobody(cluster: Cluster, tmp_path: Path) -> None:
    job = train(cluster, tmp_path / "job")
    shard = listening(cluster.processes(job)["server/0"])
    pieces = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        secrets.token_bytes(4096),
        b"\xff" * 10_000,
        GREETING[:11],
        GREETING,
        GREETING + b"\x04\x20\x05HELLO" + secrets.token_bytes(25),
        GREETING + b"\x06" + struct.pack(">Q", 1 << 62) + b"x",
        GREETING.replace(b"CURVE", b"NULL\0") + b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x06DEALER",
    ]
    held = []
    try:
        for address in (cluster.address, shard):
            for piece in pieces:
                for _ in range(10):
                    sock = raw(address)
                    held.append(sock)
                    try:
                        sock.sendall(piece)
                    except OSError:
                        pass  # hung up on, as it should be
        clock = cluster.describe(job)["clock"]  # while all of them are still there
        cluster.wait(job, lambda d: d["clock"] > clock + 5, "progress")
    finally:
        for sock in held:
            sock.close()


def test_what_makes_no_sense_is_dropped_whoever_sends_it(cluster: Cluster) -> None:
    """With a user's key: messages too large, too deep, unknown, of others, and not even messages."""
    before = resident(cluster)
    assert cluster.keys is not None
    deep = b"\x95\x61\x01\xa1t\xa1b" + b"\x81\xa1a" * 500 + b"\xc0"
    broken: list[list[bytes]] = [
        [deep],
        [b"\x95\x61\x01\xa1t\xa1b" + b"\x91" * 5000 + b"\xc0"],
        [b""],
        [b"\xc1"],
        [b"\x91\xcd\xff\xff"],
        [b"\x92\x62\x01", b"payload too many"],
        [b"\x91\x62"],
        [b"\x92\x62\xcf\xff\xff\xff\xff\xff\xff\xff\xff"],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\x92\x62\xc7\x05\x01hello"],
        [wire.encode(m.Ack(1, 2))[0]],  # type: ignore[list-item]
        [wire.encode(m.ShouldStop("stop"))[0]],  # type: ignore[list-item]
        [b"a", b"b", b"c"],
    ]
    with dealers(cluster, 1) as (sock,):
        for frames in broken:
            sock.send_multipart(frames)
        sock.send_multipart(wire.encode(m.Ping(7, b"x")))
        answers = [answer(sock) for _ in range(2)]  # to Ack, which is a request without a meaning here, and to Ping
        assert {type(a).__name__ for a in answers} == {"Refused", "Pong"}
    with dealers(cluster, 1) as (sock,):
        monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sock.send(b"\0" * (MAX_FRAME_BYTES + 1))
        assert monitor.poll(int(PATIENCE_S * 1000)), "who sends a frame that is too large is not hung up on"
        sock.disable_monitor()
        monitor.close()
    assert resident(cluster) - before < 200 << 20


def resident(cluster: Cluster) -> int:
    """Bytes of memory that the coordinator uses."""
    assert cluster.coordinator is not None
    return int(Path(f"/proc/{cluster.coordinator.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- requests that are not what they seem


def test_a_submission_that_is_replayed_is_the_same_job(cluster: Cluster) -> None:
    digest, data = pack({"train.py": b"import time\ntime.sleep(1000)"})
    token = secrets.token_hex(16)
    with party(cluster, "user") as user:
        assert isinstance(user.ask(m.PutBundle, digest, len(data), 0, data), m.Ack)
        first = user.ask(m.SubmitJob, token, digest, spec())
        assert isinstance(first, m.Reply)
        again = user.ask(m.SubmitJob, token, digest, spec("changed"))
        assert isinstance(again, m.Reply)
        assert (again.document["job"], again.document["name"]) == (first.document["job"], "attack")
        assert user.refusal(m.SubmitJob, "../" * 10, digest, spec()) == "malformed"
    with party(cluster, "user") as user:
        again = user.ask(m.SubmitJob, token, digest, spec())
        assert isinstance(again, m.Reply)
        assert again.document["job"] == first.document["job"]
    with party(cluster, "user", "mallory") as mallory:  # a token is no way to claim another's job
        hers = mallory.ask(m.SubmitJob, token, digest, spec())
        assert isinstance(hers, m.Reply)
        assert hers.document["job"] != first.document["job"]
        assert hers.document["user"] == "user/mallory"


def test_no_path_leads_out_of_a_jobs_folder(cluster: Cluster, tmp_path: Path) -> None:
    outside = [
        "../../coordinator.db",
        "../../../keys/all/coordinator.key",
        "/etc/passwd",
        "logs/../job.toml",
        "logs//x",
    ]
    outside += ["", ".", "..", "logs/", "./job.toml", "logs\0", "a" * 5000, "logs", "checkpoints"]
    digest, data = pack({"train.py": b"import time\ntime.sleep(1000)"})
    with party(cluster, "user") as user:
        user.ask(m.PutBundle, digest, len(data), 0, data)
        submitted = user.ask(m.SubmitJob, secrets.token_hex(16), digest, spec())
        assert isinstance(submitted, m.Reply)
        job = submitted.document["job"]
        assert isinstance(user.ask(m.GetFile, job, "job.toml", 0, 100), m.FileData)
        (cluster.files(job) / "link").symlink_to("/etc/passwd")
        for path in (*outside, "link"):
            assert user.refusal(m.GetFile, job, path, 0, 100) in ("malformed", "unknown"), path
        assert user.refusal(m.GetFile, job, "job.toml", 0, -1) == "malformed"
        for name in ("../jobs/" + job, "..", "", job + "/."):
            assert user.refusal(m.GetFile, name, "job.toml", 0, 100) in ("malformed", "unknown"), name
            assert user.refusal(m.ListFiles, name) == "unknown"
        for bad in ("../" + "0" * 61, "/tmp/" + "0" * 59, "x" * 64, ""):
            assert user.refusal(m.PutBundle, bad, 4, 0, b"evil") == "malformed"
        assert user.refusal(m.PutBundle, "0" * 64, 1 << 40, 0, b"") == "too-large"
        assert user.refusal(m.PutBundle, "0" * 64, 4, 0, b"evil") == "malformed"  # not what the digest says
        for name in ("../evil", "a/b", "", "x" * 65):
            assert user.refusal(m.SubmitJob, secrets.token_hex(16), digest, spec(name)) == "unusable", name


@pytest.mark.parametrize("path", ["../../../evil.py", "{outside}/evil.py", "a/../../evil.py", "./train.py/../evil.py"])
def test_no_bundle_writes_outside_of_its_folder(cluster: Cluster, tmp_path: Path, path: str) -> None:
    digest, data = pack({path.format(outside=tmp_path): b"evil", "train.py": b"print('ran')"})
    with party(cluster, "user") as user:
        user.ask(m.PutBundle, digest, len(data), 0, data)
        submitted = user.ask(m.SubmitJob, secrets.token_hex(16), digest, spec())
    assert isinstance(submitted, m.Reply)
    job = submitted.document["job"]
    document = cluster.ended(job, "FAILED")
    assert document["reason"] == "NOT_STARTED", document["message"]
    assert "ran" not in cluster.log(job, "worker-0")
    assert not list(cluster.folder.rglob("evil.py"))
    assert not list(tmp_path.rglob("evil.py"))


# ---------------------------------------------------------------- without keys


def test_without_keys_nothing_is_offered_to_other_hosts(cluster: Cluster, tmp_path: Path) -> None:
    for bind in ("0.0.0.0:0", f"{ELSEWHERE}:0"):
        where = ["--bind", bind, "--data-dir", str(tmp_path / "data")]
        refused = cluster.cli("coordinator", "start", *where, code=2, DOWNPOUR_KEYS="")
        assert "so it needs keys" in refused.stderr
    for role in ("server", "worker"):
        refused = cluster.cli(role, "start", "--join", f"{ELSEWHERE}:7070", code=2, DOWNPOUR_KEYS="")
        assert "without keys, whoever reaches that network could run code on this host" in refused.stderr
    refused = cluster.cli("list", "--join", f"{ELSEWHERE}:7070", code=2, DOWNPOUR_KEYS="")
    assert "another host is joined with keys only" in refused.stderr


def test_a_coordinator_without_keys_warns_at_every_start(tmp_path: Path) -> None:
    with Cluster(tmp_path, keys=False) as open_:
        for _ in range(2):
            daemon = open_.start_coordinator("--no-fsync")
            assert "WARNING: no keys, no encryption (--security none)" in daemon.stderr
            daemon.signal(signal.SIGTERM)
            assert daemon.end().code == 0
        open_.start_coordinator("--no-fsync")
        assert "WITHOUT KEYS" in open_.cli("nodes", "--security", "none").stdout


def test_keys_that_others_can_read_are_not_used(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(cluster.keys_for("user", "client"), folder)
    (folder / "user.key").chmod(0o644)
    assert "is open to others" in cluster.cli("list", "--keys", str(folder), code=2).stderr


# ---------------------------------------------------------------- a thousand users


@contextmanager
def dealers(cluster: Cluster, count: int, queued: int = 1000) -> Iterator[list[zmq.Socket[bytes]]]:
    """Connections with a user's key, as ``ZmqClient`` makes them; each holds ``queued`` messages before it is read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * count + 1000
    if hard < needed:
        pytest.skip(f"needs {needed} file descriptors, may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    assert cluster.keys is not None
    pair, server = load_pair(cluster.keys / "all", "user"), load_public(cluster.keys / "all", "coordinator")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    context.set(zmq.MAX_SOCKETS, count + 64)
    made = []
    try:
        for _ in range(count):
            sock = context.socket(zmq.DEALER)
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.RCVHWM, queued)
            sock.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())
            sock.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
            sock.connect(f"tcp://{cluster.address}")
            made.append(sock)
        yield made
    finally:
        for sock in made:
            sock.close()
        context.term()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def answer(sock: zmq.Socket[bytes]) -> Message:
    """The next message that comes."""
    assert sock.poll(int(PATIENCE_S * 1000)), "no answer"
    return wire.decode(sock.recv_multipart())


def test_a_thousand_users_at_once_are_answered_within_five_seconds(cluster: Cluster, tmp_path: Path) -> None:
    """Although some hold connections without a word, and one never reads what it asks for. The limit is a promise."""
    crowd = 1000
    idle = [raw(cluster.address) for _ in range(100)]
    try:
        with dealers(cluster, 100) as quiet, dealers(cluster, 1, queued=1) as (deaf,):
            for number, sock in enumerate(quiet):
                sock.send_multipart(wire.encode(m.Ping(number, b"")))
            for sock in quiet:
                answer(sock)  # they are connected from here on, and say nothing more
            for number in range(400):
                deaf.send_multipart(wire.encode(m.Ping(number, b"\0" * (256 << 10))))
            begun_s = time.perf_counter()
            with dealers(cluster, crowd) as users:
                poller = zmq.Poller()
                for number, sock in enumerate(users):
                    sock.send_multipart(wire.encode(m.Ping(number, str(number).encode())))
                    poller.register(sock, zmq.POLLIN)
                waiting = {sock: number for number, sock in enumerate(users)}
                while waiting and time.perf_counter() - begun_s < PATIENCE_S:
                    for sock, _ in poller.poll(100):
                        pong = wire.decode(sock.recv_multipart())
                        assert isinstance(pong, m.Pong)
                        number = waiting.pop(sock)
                        assert (pong.request, bytes(pong.payload)) == (number, str(number).encode())
                took_s = time.perf_counter() - begun_s
            print(f"FIGURE {crowd} clients answered in {took_s:.2f} s")
            assert not waiting
            assert took_s < 5.0
    finally:
        for connection in idle:
            connection.close()
