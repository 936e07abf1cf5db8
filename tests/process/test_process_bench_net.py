"""``downpour bench net`` with real processes and sockets, with and without keys."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Box, Ended, Running

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(120)]


def start(box: Box, *arguments: str, **environment: str) -> Running:
    command = [sys.executable, "-m", "downpour_deploy", *arguments]
    return box.command(command, box.folder, **environment)


def listener(box: Box, *arguments: str) -> tuple[Running, str]:
    running = start(box, "bench", "net", "--listen", "127.0.0.1:0", *arguments)
    return running, running.wait_line(r"^downpour bench net ready: (\S+),")[1]


def ask(box: Box, *arguments: str) -> Ended:
    return start(box, "bench", "net", *arguments, "--seconds", "0.2").end()


def measured(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.text
    document: dict[str, Any] = json.loads(ended.stdout)
    assert document["points"]
    assert all(point[way] > 0 for point in document["points"] for way in ("there", "back", "both"))
    assert document["step_s"] > 0
    return document


def end(running: Running) -> Ended:
    running.interrupt()
    ended = running.end()
    assert ended.code == 0, ended.text
    assert "Traceback" not in ended.text
    return ended


def keys(box: Box) -> None:
    """A whole set in ``keys``, and folders with parts of it."""
    assert start(box, "keys", "new", "--dir", "keys").end().code == 0
    parts = {
        "server": ["server.key", "worker.pub", "coordinator.pub"],
        "worker": ["worker.key", "server.pub", "coordinator.pub"],
        "narrow": ["worker.key", "coordinator.pub"],
        "user": ["user.key", "server.pub"],
    }
    for name, files in parts.items():
        folder = box.folder / name
        folder.mkdir(mode=0o700)
        for file in files:
            shutil.copy(box.folder / "keys" / file, folder)


def test_one_client_after_another(box: Box) -> None:
    server, address = listener(box)
    assert measured(ask(box, address, "--json"))["encrypted"] is False
    table = ask(box, address, "--model", "10MB")
    assert table.code == 0, table.text
    assert "a model of 10 MB: push and pull take about" in table.stdout
    assert table.stderr == ""
    assert end(server).stdout.count("measured:") == 2


def test_a_second_one_at_the_same_time_is_turned_away(box: Box) -> None:
    server, address = listener(box)
    both = [start(box, "bench", "net", address, "--seconds", "600") for _ in range(2)]
    server.wait_until(lambda: any(running.over for running in both), "one of the two to be turned away")
    turned_away, measuring = sorted(both, key=lambda running: not running.over)
    assert turned_away.end().code == 1
    assert "another measurement is under way" in turned_away.text
    measuring.interrupt()
    assert measuring.end().code == 130
    end(server)


def test_with_keys_each_side_proves_its_own(box: Box) -> None:
    keys(box)
    server, address = listener(box, "--keys", "server", "--once")
    assert "for worker" in server.text or server.wait_line("presenting server.key")
    refused = ask(box, address, "--keys", "user")
    assert (refused.code, refused.stdout) == (77, "")
    assert "copy user.pub into" in refused.stderr
    unknown = ask(box, address, "--keys", "narrow")
    assert unknown.code == 77
    assert "copy the .pub" in unknown.stderr
    without = ask(box, address)
    assert without.code == 77
    assert "wants a key" in without.stderr
    assert measured(ask(box, address, "--keys", "worker", "--json"))["encrypted"] is True
    assert server.end().code == 0, "once"


def test_both_ends_on_this_host(box: Box) -> None:
    assert measured(ask(box, "--json"))["encrypted"] is False
    assert measured(ask(box, "--json", "--security", "curve"))["encrypted"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_local_measurement_leaves_nothing(box: Box, number: signal.Signals) -> None:
    running = start(box, "bench", "net", "--security", "curve", "--seconds", "600")
    running.wait_until(lambda: len(box.processes()) == 2, "other end")
    os.kill(running.pid, number)
    ended = running.end()
    assert ended.code == 128 + number, ended.text
    assert "Traceback" not in ended.text
    assert ended.stdout == ""


def test_nobody_there(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ended = ask(box, f"127.0.0.1:{port}", "--timeout", "1")
    assert (ended.code, ended.stdout) == (69, "")
    assert "nothing listens at" in ended.stderr


def test_a_listener_that_says_nothing(box: Box) -> None:
    server, address = listener(box)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        ended = ask(box, address, "--timeout", "1")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert ended.code == 69
    assert "does not answer" in ended.stderr
    end(server)


def test_an_address_that_is_taken(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = ask(box, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (ended.code, ended.stdout) == (2, "")
    assert "cannot listen on" in ended.stderr


def test_garbage_changes_nothing(box: Box, tmp_path: Path) -> None:
    server, address = listener(box)
    host, _, port = address.rpartition(":")
    for garbage in (
        b"GET / HTTP/1.0\r\n\r\n",
        os.urandom(4096),
        b"\xff" + bytes(8) + b"\x7f\x03\x00" + os.urandom(200),
    ):
        with socket.create_connection((host, int(port)), 5.0) as sock:
            sock.sendall(garbage)
    measured(ask(box, address, "--json"))
    end(server)
