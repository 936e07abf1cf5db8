"""A cluster of real daemons for tests: a coordinator, agents and users on loopback, each with the keys of its role.

:mod:`hosts` has the same with a network namespace for each host. Everything that is started carries ``DPTEST_MARK`` in
its environment, which agents hand on to the processes of jobs, so that all of it is found again in ``/proc``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from gone import wait_gone

from downpour.jobs.client import ClusterClient
from downpour_common.keys import ROLES, new_keys
from downpour_common.names import process_name
from downpour_common.transport.zeromq import new_key_pair

SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = Path(__file__).parents[2] / "examples"
MARK = "DPTEST_MARK"
PATIENCE_S = 40.0
"""Longest wait for something that should take a moment, on a busy machine."""
GONE_S = 5.0
"""Time that processes have to vanish once their agent was killed."""
LOOK_S = 0.05
"""Pause between two looks at something that nobody announces."""
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
NEEDED = {
    "coordinator": ("coordinator.key", "*.pub"),
    "server": ("server.key", "coordinator.pub"),
    "worker": ("worker.key", "coordinator.pub"),
    "user": ("user.key", "coordinator.pub"),
}
"""The files that each role has in its folder of keys: these and no others."""

Found = TypeVar("Found")


# ---------------------------------------------------------------- what the kernel knows


def environment_of(pid: int) -> dict[str, str]:
    """What the process was started with; empty when it has ended, as a zombie too."""
    try:
        data = Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return {}
    pairs = (pair.decode(errors="replace").split("=", 1) for pair in data.split(b"\0") if b"=" in pair)
    return {name: value for name, value in pairs}  # noqa: C416  pairs are lists


def everybody() -> list[tuple[int, dict[str, str]]]:
    """All processes with their environment."""
    return [(int(entry), environment_of(int(entry))) for entry in os.listdir("/proc") if entry.isdigit()]


def until(condition: Callable[[], Found | None], what: str, timeout_s: float = PATIENCE_S) -> Found:
    """Look until ``condition`` gives something true; that."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"no {what} within {timeout_s:g} s"
        pause.wait(LOOK_S)
    return found


def dead_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Everything it wrote."""
        return self.stdout + self.stderr

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


class Daemon:
    """A process that was started here, in a session of its own; what it writes goes to files."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        self._shown = 0
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @property
    def stdout(self) -> str:
        """What it has written to stdout so far."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._err.read_text(errors="replace")

    @property
    def text(self) -> str:
        """Everything it has written so far."""
        return self.stdout + self.stderr

    def fresh(self) -> str:
        """What it has written since this was asked last."""
        text = self.text
        shown, self._shown = self._shown, len(text)
        return text[shown:]

    def line(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait for output that matches; fails at once when the process ends without any."""

        def look() -> re.Match[str] | None:
            over = self.process.poll() is not None
            found = re.search(pattern, self.text, re.MULTILINE)
            assert found or not over, f"{self.name} ended ({self.process.poll()}) without {pattern!r}:\n{self.text}"
            return found

        return until(look, f"line {pattern!r} of {self.name}", timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """To the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def end(self, timeout_s: float = PATIENCE_S) -> Ended:
        """Wait for the end."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} still runs after {timeout_s:g} s:\n{self.text}") from None
        return Ended(code, self.stdout, self.stderr)


# ---------------------------------------------------------------- the cluster


class Cluster:
    """See the module. Use it in a ``with``: nothing is left when that is over, however it ends."""

    def __init__(self, folder: Path, keys: bool = True, node_timeout_s: float = 3.0) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.node_timeout_s = node_timeout_s
        self.daemons: list[Daemon] = []
        self.coordinator: Daemon | None = None
        self.agents: dict[str, Daemon] = {}
        self.address = ""
        """HOST:PORT of the coordinator"""
        self.tmpdir = Path(tempfile.mkdtemp(prefix="dptest-", dir="/tmp"))
        self._count = 0
        self._shown: set[Path] = set()
        self.keys = folder / "keys" if keys else None
        if self.keys is not None:
            new_keys(self.keys / "all", {role: new_key_pair() for role in ROLES})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------- where things run

    def command_at(self, host: str, command: Sequence[str]) -> list[str]:
        """``command`` as it runs on ``host``."""
        return list(command)

    def inside(self, host: str, work: Callable[[], Found]) -> Found:
        """Do it as if on ``host``."""
        return work()

    def bind(self) -> str:
        """Where the coordinator listens."""
        return "127.0.0.1:0"

    def keys_for(self, role: str, host: str = "") -> str:
        """A folder with the keys of the role, as an administrator would have put it on ``host``."""
        assert self.keys is not None
        folder = self.keys / f"{host or 'here'}-{role}"
        if not folder.exists():
            folder.mkdir(mode=0o700)
            for pattern in NEEDED[role]:
                for source in (self.keys / "all").glob(pattern):
                    shutil.copy2(source, folder)
        return str(folder)

    def environment(self, **extra: str) -> dict[str, str]:
        """What everything that is started here gets."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DOWNPOUR_")}
        return {**kept, "TMPDIR": str(self.tmpdir), MARK: self.mark, "OMP_NUM_THREADS": "1", **extra}

    def spawn(self, name: str, arguments: Sequence[str], host: str = "", **environment: str) -> Daemon:
        """``downpour ARGUMENTS`` on ``host``."""
        self._count += 1
        command = self.command_at(host, [sys.executable, "-m", "downpour_deploy", *arguments])
        daemon = Daemon(f"{self._count:02}-{name}", command, self.environment(**environment), self.folder)
        self.daemons.append(daemon)
        return daemon

    def _security(self, role: str, host: str) -> list[str]:
        return ["--security", "none"] if self.keys is None else ["--keys", self.keys_for(role, host)]

    # -------------------------------------------------------- daemons

    def start_coordinator(self, *options: str) -> Daemon:
        """Start it, or start it again at the same address in the same data folder; wait until it is ready."""
        data = str(self.folder / "data-coordinator")
        where = ["--bind", self.address or self.bind(), "--data-dir", data, "--node-timeout", str(self.node_timeout_s)]
        arguments = ["coordinator", "start", *where, *self._security("coordinator", "coordinator"), *options]
        self.coordinator = self.spawn("coordinator", arguments, "coordinator")
        self.address = self.coordinator.line(r"^downpour coordinator ready: (\S+:\d+)", PATIENCE_S)[1]
        return self.coordinator

    def begin_agent(self, role: str, name: str, *options: str) -> Daemon:
        """Start an agent on the host of its name; do not wait."""
        data = str(self.folder / f"data-{name}")
        where = ["--join", self.address, "--name", name, "--data-dir", data]
        arguments = [role, "start", *where, *self._security(role, name), *options]
        self.agents[name] = self.spawn(name, arguments, name)
        return self.agents[name]

    def start_agents(self, agents: dict[str, tuple[str, ...]]) -> None:
        """Start agents by name, (role, options …), and wait until they have joined."""
        for name, (role, *options) in agents.items():
            self.begin_agent(role, name, *options)
        for name in agents:
            self.agents[name].line(r"^downpour (server|worker) ready: ")

    # -------------------------------------------------------- users

    def user_options(self) -> list[str]:
        """How a user's command comes to the cluster."""
        return ["--join", self.address, *self._security("user", "client")]

    def begin(self, *arguments: str, host: str = "client", **environment: str) -> Daemon:
        """``downpour ARGUMENTS`` by a user; the cluster and the keys are in the environment."""
        where = {"DOWNPOUR_COORDINATOR": self.address}
        if self.keys is not None:
            where["DOWNPOUR_KEYS"] = self.keys_for("user", "client")
        return self.spawn(f"downpour-{arguments[0]}", arguments, host, **{**where, **environment})

    def cli(self, *arguments: str, code: int | None = 0, timeout_s: float = PATIENCE_S, **environment: str) -> Ended:
        """:meth:`begin` and wait for the end, which must be with ``code``."""
        ended = self.begin(*arguments, **environment).end(timeout_s)
        assert code is None or ended.code == code, f"exit code {ended.code}, not {code}:\n{ended.text}"
        return ended

    def client(self) -> ClusterClient:
        """A user's connection, from where this is called."""
        keys = None if self.keys is None else self.keys_for("user", "client")
        return ClusterClient(self.address, keys, "none" if self.keys is None else None)

    def ask(self, question: Callable[[ClusterClient], Found]) -> Found:
        """Have a user at the client's host ask something."""

        def work() -> Found:
            with self.client() as client:
                return question(client)

        return self.inside("client", work)

    def submit(self, script: Path, *args: object, **fields: Any) -> str:
        """Submit a job as ``downpour.submit`` does; its id."""
        import downpour

        def work() -> str:
            keys = None if self.keys is None else self.keys_for("user", "client")
            security = "none" if self.keys is None else None
            given = {"threads": 1, **fields}
            return downpour.submit(script, args, join=self.address, keys=keys, security=security, **given).id

        return self.inside("client", work)

    def describe(self, job: str) -> dict[str, Any]:
        """The job's document."""
        return self.ask(lambda client: client.describe(job))

    def wait(
        self, job: str, condition: Callable[[dict[str, Any]], Any], what: str, timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Ask about the job until ``condition`` holds for its document; that document."""

        def ask(client: ClusterClient) -> dict[str, Any]:
            newest: dict[str, Any] = {}

            def look() -> bool:
                newest.update(client.describe(job))
                over = newest["state"] in ENDED
                assert not over or condition(newest), f"{job} ended without {what}: {json.dumps(newest, indent=1)}"
                return bool(condition(newest))

            try:
                until(look, f"{what} of {job}", timeout_s)
            except AssertionError as error:
                raise AssertionError(f"{error}: {json.dumps(newest, indent=1)}") from None
            return newest

        return self.ask(ask)

    def ended(self, job: str, state: str = "SUCCEEDED", timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until the job is over, with this state; its document."""
        return self.wait(job, lambda d: d["state"] == state, state, timeout_s)

    def cancel_all(self) -> None:
        """End what still goes on, and wait for it."""

        def over(job: str) -> bool:
            return self.describe(job)["ended_s"] is not None

        left = [j["job"] for j in self.ask(lambda client: client.jobs()) if j["ended_s"] is None]
        for job in left:
            self.ask(partial(ClusterClient.cancel, job=job))
        for job in left:
            until(partial(over, job), f"end of {job}")

    def running(self, job: str, clock: int = 1) -> dict[str, Any]:
        """Wait until the job trains."""
        return self.wait(job, lambda d: d["state"] == "RUNNING" and d["clock"] >= clock, f"clock {clock}")

    def node(self, name: str) -> dict[str, Any]:
        """A node's document; empty when there is none."""
        nodes = self.ask(lambda client: client.nodes())["nodes"]
        return next((n for n in nodes if n["node"] == name), {})

    def until_node(self, name: str, state: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the node is in this state; ``""``: gone."""
        newest: dict[str, Any] = {}

        def look() -> bool:
            newest.clear()
            newest.update(self.node(name))
            return bool(newest.get("state", "") == state)

        try:
            until(look, f"{state or 'end'} of {name}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {json.dumps(newest)}") from None

    # -------------------------------------------------------- what a job has and leaves

    def files(self, job: str) -> Path:
        """The job's folder at the coordinator."""
        return self.folder / "data-coordinator" / "jobs" / job

    def log(self, job: str, process: str) -> str:
        """The output of ``worker-0`` or ``worker-0.1`` as the coordinator has it."""
        path = self.files(job) / "logs" / f"{process}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def metrics(self, job: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.files(job) / "metrics.jsonl").read_text().splitlines()]

    def processes(self, job: str) -> dict[str, int]:
        """The living processes of the job on all hosts, by ``worker/0``, ``server/1`` or ``server/1b``."""
        found = {}
        for pid, environment in everybody():
            for variable, role, index in (
                ("DOWNPOUR_WORKER", "worker", "slot"),
                ("DOWNPOUR_SHARD", "server", "process"),
            ):
                if environment.get(MARK) == self.mark and variable in environment:
                    config = json.loads(environment[variable])
                    if config["job"] == job:
                        found[process_name(role, config[index], config["shards"])] = pid
        return found

    def all_of(self, job: str) -> list[int]:
        """Like :meth:`processes`, with those that they have started."""
        whose = f'"job": "{job}"'
        return [pid for pid, e in everybody() if whose in e.get("DOWNPOUR_WORKER", "") + e.get("DOWNPOUR_SHARD", "")]

    # -------------------------------------------------------- the end

    def show(self) -> None:
        """Print what the daemons have said since this was called last; pytest shows it where a test has failed."""
        for daemon in self.daemons:
            if text := daemon.fresh():
                print(f"---- {daemon.name}\n{text}")
        for path in sorted((self.folder / "data-coordinator" / "jobs").glob("*/logs/*.log")):
            if path not in self._shown:
                self._shown.add(path)
                print(f"---- {path.parts[-3]} {path.name}\n{path.read_text(errors='replace')[-800:]}")

    def close(self) -> None:
        """Kill what was started here and all that came of it; fails when something outlives its agent."""
        for daemon in reversed(self.daemons):
            daemon.kill()
        late = wait_gone([pid for pid, e in everybody() if e.get(MARK) == self.mark], GONE_S)
        left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in late}
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        wait_gone(late, GONE_S)
        shutil.rmtree(self.tmpdir, ignore_errors=True)
        assert not left, f"processes left behind: {left}"


# ---------------------------------------------------------------- results


def weights(path: Path) -> bytes:
    """model.safetensors without its metadata: names, shapes, dtypes and bytes of the tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + data[8 + length :]
