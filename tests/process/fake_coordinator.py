"""A coordinator for agents under test: one thread, told what to do by the test, holding what it was given."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from downpour_common import messages as m
from downpour_common.bundle import pack
from downpour_common.keys import ServerKeys
from downpour_common.transport import Peer
from downpour_common.transport.zeromq import ZmqServer
from downpour_common.wire import CONTROL_HEADER_LIMIT

Id = tuple[str, str, int, int]
LONG_S = 30.0


class FakeCoordinator:
    """Answers one agent as PROTOCOL.md wants it. What it holds outlives :meth:`vanish`."""

    def __init__(self, folder: Path, keys: ServerKeys | None = None) -> None:
        self._folder, self._keys = folder, keys
        self._server = ZmqServer("tcp://127.0.0.1:0", CONTROL_HEADER_LIMIT, keys)
        self.address = self._server.address
        self.join = self.address.removeprefix("tcp://")
        self.files: dict[tuple[str, str], bytes] = {}
        self.logs: defaultdict[Id, bytearray] = defaultdict(bytearray)
        self.ended: dict[Id, dict[str, Any]] = {}
        self.registered: list[m.RegisterNode] = []
        self.beats: list[dict[str, Any]] = []
        self.left: list[str] = []
        self.fetched: list[tuple[str, str]] = []
        """(job, path) of every first part that was asked for"""
        self.pids: set[int] = set()
        self.refuse = ""
        self._known: set[str] = set()
        self._peer: Peer = b""

    def close(self) -> None:
        """Be gone for good."""
        self._server.close()

    def vanish(self, forget: bool = False) -> None:
        """Be gone for now; ``forget``: without knowing the agent when back."""
        self._server.close()
        if forget:
            self._known.clear()

    def come_back(self) -> None:
        """Listen where it did before."""
        self._server = ZmqServer(self.address, CONTROL_HEADER_LIMIT, self._keys)

    def send(self, message: m.Message) -> None:
        """To the agent."""
        self._server.send(self._peer, message)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Serve until the condition holds."""
        deadline_s = time.monotonic() + LONG_S
        while not condition():
            assert time.monotonic() < deadline_s, f"no {what} within {LONG_S:g} s"
            self.serve(0.02)

    def serve(self, wait_s: float) -> None:
        """Answer what has come."""
        for peer, message in self._server.poll(wait_s):
            self._peer = peer
            answer = self._answer(message)
            if answer is not None:
                self._server.send(peer, answer)

    def _answer(self, message: m.Message) -> m.Message | None:
        match message:
            case m.RegisterNode():
                if self.refuse:
                    return m.Refused(message.request, m.Refusal.FORBIDDEN, self.refuse)
                self.registered.append(message)
                self._known.add(message.instance)
                return m.Ack(message.request, 0)
            case m.Heartbeat():
                self.beats.append(message.document)
                self.pids |= {p["pid"] for p in message.document["processes"] if p["pid"]}
                return None if message.instance in self._known else m.WhoAreYou()
            case m.Ping():
                return m.Pong(message.request, {}, bytes(message.payload))
            case m.LogData():
                log = self.logs[message.job, message.role, message.index, message.epoch]
                if message.offset == len(log):
                    log += message.payload
                return m.Ack(message.request, len(log))
            case m.ProcessEnded():
                self.ended[message.job, message.role, message.index, message.epoch] = message.document
                return m.Ack(message.request, 0)
            case m.GetFile():
                return self._part(message)
            case m.NodeLeaving():
                self.left.append(message.reason)
                return m.Ack(message.request, 0)
        raise AssertionError(f"an agent sent {message}")

    def _part(self, message: m.GetFile) -> m.Message:
        if not message.offset:
            self.fetched.append((message.job, message.path))
        data = self.files.get((message.job, message.path))
        if data is None:
            return m.Refused(message.request, m.Refusal.UNKNOWN, f"there is no {message.path}")
        part = data[message.offset : message.offset + message.length]
        return m.FileData(message.request, len(data), message.offset, part)

    # ------------------------------------------------------------ jobs

    def job(self, job: str, script: str, workers: int = 1, **document: Any) -> dict[str, Any]:
        """A job with this script; the document of its orders."""
        folder = self._folder / f"{job}-code"
        folder.mkdir()
        (folder / "train.py").write_text(script)
        (folder / "module_of_mine.py").write_text("HERE = True\n")
        path = self._folder / f"{job}.bundle"
        bundle = pack(str(folder), str(path))
        self.files[job, "bundle"] = path.read_bytes()
        spec = {"name": "job", "script": "train.py", "folder": ".", "workers": workers, "shards": 1}
        return {
            "spec": {**spec, **document.pop("spec", {})},
            "bundle": bundle.digest,
            "bundle_bytes": bundle.nbytes,
            "workers": workers,
            "coordinator": "",
            "fetch": [],
            "keys": None,
            "gpu": -1,
            "threads": 0,
            **document,
        }

    def start(self, process: Id, document: dict[str, Any]) -> None:
        """Order a process and wait until it runs or has ended."""
        self.send(m.StartProcess(*process, document))
        self.until(lambda: self.state(process) == "running" or process in self.ended, f"{process}")

    def state(self, process: Id) -> str:
        """As the last heartbeat has it; "" when that does not name the process."""
        for line in self.beats[-1]["processes"] if self.beats else []:
            if (line["job"], line["role"], line["index"], line["epoch"]) == process:
                return str(line["state"])
        return ""

    def pid(self, process: Id) -> int:
        """As the last heartbeat has it."""
        lines = self.beats[-1]["processes"]
        return next(int(p["pid"]) for p in lines if (p["job"], p["role"], p["index"], p["epoch"]) == process)

    def log(self, process: Id) -> str:
        """What the process has written, as far as it is here."""
        return self.logs[process].decode()
