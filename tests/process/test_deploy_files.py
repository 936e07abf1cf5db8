"""The files of deploy/systemd and deploy/container, as far as they can be tested without systemd and Docker."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from downpour_common import exitcodes
from downpour_common.keys import load_pair, load_public

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILE = DEPLOY / "container" / "Dockerfile"
COMPOSE = DEPLOY / "container" / "compose.yaml"
INSTALLED = "/opt/downpour/bin/downpour"


@cache
def help_of(*command: str) -> str:
    """What ``downpour COMMAND --help`` prints; fails when there is no such command."""
    environment = {**os.environ, "COLUMNS": "200"}
    line = [sys.executable, "-m", "downpour_deploy", *command, "--help"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def check_command(words: list[str]) -> None:
    """Fails unless ``downpour WORDS`` is a command with these options."""
    name = words[:2] if words[0] in ("coordinator", "server", "worker", "keys") else words[:1]
    known = set(re.findall(r"--[a-z-]+", help_of(*name)))
    assert {word for word in words if word.startswith("--")} <= known, words


# ---------------------------------------------------------------- systemd


class Unit:
    """A unit's assignments, in order; the only parts of the syntax that the files use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and line[0] not in "#[":
                key, equals, value = line.partition("=")
                assert equals, line
                self.values.setdefault(key, []).append(value)

    def one(self, key: str) -> str:
        (value,) = self.values[key]
        return value


@pytest.fixture(params=UNITS, ids=lambda path: path.stem)
def unit(request: pytest.FixtureRequest) -> Unit:
    """Each unit."""
    return Unit(request.param)


def test_there_is_a_unit_for_each_role() -> None:
    assert [path.stem for path in UNITS] == ["downpour-coordinator", "downpour-server", "downpour-worker"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """The program must be there to be verified, so copies name another one."""
    for path in UNITS:
        text = path.read_text(encoding="utf-8")
        assert text.count(INSTALLED) == 1
        (tmp_path / path.name).write_text(text.replace(INSTALLED, sys.executable), encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / path.name) for path in UNITS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # What it says of other units is about this machine.
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "downpour" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr


def test_a_unit_starts_a_command_that_there_is(unit: Unit) -> None:
    program, *words = shlex.split(unit.one("ExecStart"))
    assert program == INSTALLED
    assert words[:2] == [unit.path.stem.removeprefix("downpour-"), "start"]
    check_command(words)
    state = unit.one("StateDirectory")
    assert f"--data-dir %S/{state}" in unit.one("ExecStart")


def test_a_unit_knows_the_exit_codes_that_are_final(unit: Unit) -> None:
    final = {int(code) for code in unit.one("RestartPreventExitStatus").split()}
    agent = unit.path.stem != "downpour-coordinator"
    assert final == ({exitcodes.USAGE, exitcodes.REFUSED} if agent else {exitcodes.USAGE})
    assert unit.one("Restart") == "on-failure"


def test_a_unit_gives_processes_time_to_end(unit: Unit) -> None:
    assert unit.one("KillMode") == "mixed"
    grace_s = 8.0
    if unit.path.stem != "downpour-coordinator":
        found = re.search(r"--grace\b.*?default: (\d+(\.\d+)?)", help_of(*unit_command(unit)), re.DOTALL)
        assert found, help_of(*unit_command(unit))
        grace_s = float(found[1])
        assert unit.one("TimeoutStartSec") == "infinity", "an agent waits for its coordinator"
        assert unit.one("OOMPolicy") == "continue", "one process that was killed must not take the others with it"
    assert float(unit.one("TimeoutStopSec")) > grace_s + 13


def unit_command(unit: Unit) -> list[str]:
    return shlex.split(unit.one("ExecStart"))[1:3]


def test_hardening_leaves_training_what_it_needs() -> None:
    units = {path.stem.removeprefix("downpour-"): Unit(path) for path in UNITS}
    for unit in units.values():
        assert unit.one("NoNewPrivileges") == "yes"
        assert unit.one("ProtectSystem") == "strict"
        assert unit.one("User") == "downpour", "memory is shared between processes of one user"
    for role in ("server", "worker"):
        keys = units[role].values.keys()
        hides = {
            "PrivateUsers",
            "PrivateNetwork",
            "PrivatePIDs",
            "ProcSubset",
            "PrivateMounts",
            "MemoryDenyWriteExecute",
        }
        assert not keys & hides, "shards reach the memory of workers through /proc; torch makes code"
    closes_dev = {"PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy"}
    assert not units["worker"].values.keys() & closes_dev, "GPUs are devices"


def test_daemons_tell_systemd_when_they_are_ready(box: Box, unit: Unit) -> None:
    assert unit.one("Type") == "notify"
    role = unit.path.stem.removeprefix("downpour-")
    path = box.tmpdir / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(30.0)
        downpour = [sys.executable, "-m", "downpour_deploy"]
        start = [*downpour, "coordinator", "start", "--bind", "127.0.0.1:0", "--data-dir", "data"]
        environment = {"NOTIFY_SOCKET": str(path)}
        coordinator = box.command(start, box.folder, **(environment if role == "coordinator" else {}))
        started = [coordinator]
        if role != "coordinator":
            address = coordinator.wait_line(r"^downpour coordinator ready: (\S+),")[1]
            agent = [*downpour, role, "start", "--join", address]
            started.insert(0, box.command(agent, box.folder, **environment))
        told: list[str] = []
        while "READY=1" not in told:
            told += manager.recv(4096).decode().splitlines()
        for running in started:
            running.interrupt()
            assert running.end().code == 0
        while "STOPPING=1" not in told:
            told += manager.recv(4096).decode().splitlines()
    path.unlink()


# ---------------------------------------------------------------- container


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continued lines joined and comments left out."""
    lines = [x for x in DOCKERFILE.read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines()]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps this path, or a folder above it, from the build."""
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(
        fnmatch(candidate, pattern.removeprefix("**/")) or fnmatch(candidate, pattern)
        for pattern in patterns
        if pattern and not pattern.startswith("#")
        for candidate in (above + parts if pattern.startswith("**/") else above)
    )


def test_the_image_has_a_pinned_base_and_an_unprivileged_user() -> None:
    found = instructions()
    names = [name for name, _ in found]
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert all(re.fullmatch(r"python:3\.\d+(\.\d+)?-slim-[a-z]+", base) for base in bases), bases
    assert len(set(bases)) == 1, "a venv works with the Python that it was made with"
    last = len(names) - 1 - names[::-1].index("FROM")
    users = [rest for name, rest in found[last:] if name == "USER"]
    assert [user.split(":")[0] for user in users] == ["10001"]
    assert "ADD" not in names, "COPY says what is copied"
    assert not [rest for name, rest in found if name == "RUN" and re.search(r"\b(curl|wget)\b", rest)]
    assert ("ENTRYPOINT", '["downpour"]') in found
    json.loads(dict(found)["CMD"])


def test_the_image_is_built_from_files_that_there_are() -> None:
    copies = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    sources = [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]
    assert {"constraints.txt", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"((?:\w+/)downpour\w*)",', project)
    assert len(packages) == 5
    for path in [*packages, "README.md", "LICENSE"]:
        assert any(path == source or path.startswith(f"{source}/") for source in sources), f"{path} is not copied"
        assert not ignored(path)


def test_no_key_gets_into_the_image() -> None:
    for path in (
        "keys/user.key",
        "user.key",
        "worker/cluster-keys/coordinator.key",
        ".git/config",
        "tests/conftest.py",
    ):
        assert ignored(path), path
    assert not ignored("common/downpour_common/keys.py")


def blocks(text: str, indent: int) -> dict[str, str]:
    """The keys at this indentation and what stands below and behind each: enough of YAML for one file of our own."""
    found: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        start = re.match(rf"^ {{{indent}}}([a-z_-]+):(.*)$", line)
        if start:
            key = start[1]
            assert key not in found, f"{key} twice"
            found[key] = start[2].strip()
        elif key and line.strip() and not line.lstrip().startswith("#"):
            found[key] += "\n" + line
    return found


def services() -> dict[str, dict[str, str]]:
    top = blocks(COMPOSE.read_text(encoding="utf-8"), 0)
    assert set(top) == {"name", "services", "volumes"}
    return {name: blocks(body, 4) for name, body in blocks(top["services"], 2).items()}


def test_compose_has_the_cluster() -> None:
    found = services()
    assert list(found) == ["keys", "coordinator", "server", "worker", "user"]
    assert (found["server"]["scale"], found["worker"]["scale"]) == ("2", "2")
    assert "dockerfile: deploy/container/Dockerfile" in found["keys"]["build"]
    assert (COMPOSE.parent / "../..").resolve() == ROOT
    for name, service in found.items():
        assert service["image"] == "downpour"
        assert service["cap_drop"] == "[ALL]"
        if name in ("coordinator", "server", "worker"):
            assert "service_completed_successfully" in service["depends_on"], "keys come first"
            assert service["init"] == "true", "somebody must reap what processes of jobs leave behind"


def test_compose_mounts_volumes_that_there_are() -> None:
    volumes = set(blocks(blocks(COMPOSE.read_text(encoding="utf-8"), 0)["volumes"], 2))
    used = {m for s in services().values() for m in re.findall(r"- ([a-z-]+):/", s.get("volumes", ""))}
    assert used == volumes
    assert "keys-all" not in services()["worker"]["volumes"], "the code of jobs must not see the coordinator's key"
    prepared = " ".join(rest for name, rest in instructions() if name == "RUN")
    for folder in set(re.findall(r":(/keys/\w+)", COMPOSE.read_text(encoding="utf-8"))):
        assert folder in prepared, f"{folder} gets its owner from the image"


def test_compose_runs_commands_that_there_are() -> None:
    found = services()
    for name in ("coordinator", "server", "worker", "user"):
        check_command(shlex.split(found[name]["command"]))
    health = json.loads(found["coordinator"]["healthcheck"].splitlines()[1].partition("test:")[2])
    assert health[:2] == ["CMD", "downpour"]
    check_command(health[2:])


def test_the_keys_service_gives_each_role_what_it_needs(tmp_path: Path) -> None:
    command = services()["keys"]["command"]
    script = command.partition("- |\n")[2].replace("$$", "$").replace("/keys/", f"{tmp_path}/")
    for folder in ("all", "server", "worker", "user"):
        (tmp_path / folder).mkdir(mode=0o700)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "downpour").write_text(f'#!/bin/sh\nexec {sys.executable} -m downpour_deploy "$@"\n')
    (programs / "downpour").chmod(0o755)
    assert json.loads(services()["keys"]["entrypoint"]) == ["/bin/sh", "-euc"]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    for _ in range(2):  # at the second start the keys are there
        subprocess.run(["/bin/sh", "-euc", script], env=environment, check=True, capture_output=True)
    house = load_public(tmp_path / "all", "coordinator")
    load_pair(tmp_path / "all", "coordinator")
    for role in ("server", "worker", "user"):
        assert load_public(tmp_path / role, "coordinator") == house
        assert load_pair(tmp_path / role, role).public == load_public(tmp_path / "all", role)
        files = sorted(path.name for path in (tmp_path / role).iterdir())
        assert files == ["coordinator.pub", f"{role}.key"]
        assert stat.S_IMODE((tmp_path / role / f"{role}.key").stat().st_mode) == 0o600


# ---------------------------------------------------------------- words


def documented() -> Iterator[tuple[Path, str]]:
    """Commands of downpour that the texts of deploy/ show."""
    for path in (DEPLOY / "README.md", DEPLOY / "systemd" / "README.md", COMPOSE):
        for line in path.read_text(encoding="utf-8").splitlines():
            plain = line.lstrip("# ").rstrip()
            if plain.startswith("downpour "):
                yield path, plain.partition("#")[0]


def test_the_texts_show_commands_that_there_are() -> None:
    shown = list(documented())
    assert len(shown) >= 5
    for path, line in shown:
        words = shlex.split(line)[1:]
        if words[0] == "doctor" and "doctor" not in help_of():
            continue
        try:
            check_command(words)
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {line}") from error
