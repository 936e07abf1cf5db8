"""Real processes under test: started here, watched through their output, and proven to be gone afterwards.

Every process of a test carries ``DOWNPOUR_TEST_MARK=<uuid>`` in its environment, so that whatever it started is
found again in ``/proc``, however far away from its parent it has gone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gone import wait_gone

SCRIPTS = Path(__file__).parent / "scripts"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MARK = "DOWNPOUR_TEST_MARK"
PROMPT_S = 30.0
"""A failed job must have ended by then."""
GONE_S = 3.0
"""Time that a killed process has to vanish once the launcher has ended."""
SHM = Path("/dev/shm")


# ---------------------------------------------------------------- what the kernel knows


def environment_of(pid: int) -> dict[bytes, bytes]:
    """What the process was started with; empty when it has ended, as a zombie too."""
    try:
        data = Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return {}
    return dict(pair.split(b"=", 1) for pair in data.split(b"\0") if b"=" in pair)


def marked(mark: str) -> list[int]:
    """Living processes with the mark in their environment."""
    everyone = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in everyone if environment_of(pid).get(MARK.encode()) == mark.encode()]


def command_of(pid: int) -> list[str]:
    """The process' command line; empty when it has ended."""
    try:
        return Path("/proc", str(pid), "cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def segments() -> set[str]:
    """Shared memory with Downpour's name on it, whoever's."""
    return {entry.name for entry in SHM.iterdir() if "downpour" in entry.name} if SHM.is_dir() else set()


def orphaned_segments(before: set[str]) -> list[str]:
    """Downpour's shared memory that is new since ``before`` and that no living process has mapped or open."""
    new = segments() - before
    if not new:
        return []
    in_use = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                maps = Path("/proc", entry, "maps").read_text(errors="replace")
                files = [os.readlink(f) for f in Path("/proc", entry, "fd").iterdir()]
            except OSError:
                continue
            in_use |= {name for name in new if f"/dev/shm/{name}" in maps or f"/dev/shm/{name}" in files}
    return sorted(name for name in new - in_use if (SHM / name).exists())


# ---------------------------------------------------------------- one command


@dataclass(frozen=True)
class Ended:
    """A command that has ended. ``out`` is the run directory that was asked for."""

    code: int
    stdout: str
    stderr: str
    wall_s: float
    out: Path

    @property
    def text(self) -> str:
        """Everything it wrote."""
        return self.stdout + self.stderr

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object of ``--json``; fails where stdout holds anything else."""
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found

    @property
    def job(self) -> dict[str, Any]:
        """``job.toml``."""
        return tomllib.loads((self.out / "job.toml").read_text(encoding="utf-8"))

    def tensors(self) -> dict[str, Any]:
        """``model.safetensors`` as torch's own users would read it."""
        from safetensors.torch import load_file

        return load_file(self.out / "model.safetensors")

    def manifests(self) -> list[Path]:
        """The committed checkpoints, oldest first."""
        return sorted((self.out / "checkpoints").glob("[0-9]*/manifest.json"))

    def expect_failure(self, who: str, code: int, message: str) -> dict[str, Any]:
        """Assert a prompt end with one clear message about ``who``; gives the failure of ``--json``."""
        document = self.document
        failure = document["failure"]
        assert failure is not None, self.text
        assert (document["state"], document["exit_code"], self.code) == ("FAILED", code, code), self.text
        name = failure["role"] if failure["index"] < 0 else f"{failure['role']}/{failure['index']}"
        assert name == who, self.text
        assert re.search(message, failure["message"]), failure["message"]
        verdicts = [line for line in self.stderr.splitlines() if re.match(r"\S+ failed: ", line)]
        assert len(verdicts) == 1, verdicts
        assert verdicts[0].startswith(f"{who} failed: "), verdicts
        assert document["model"] is None
        assert not (self.out / "model.safetensors").exists()
        assert self.wall_s < PROMPT_S
        assert "Exception in callback" not in self.text
        return failure


class Running:
    """A command that has been started, in a session of its own. Its output is collected as it comes."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: dict[str, str], out: Path) -> None:
        self.out = out
        self._started_s = time.monotonic()
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [
            threading.Thread(target=self._read, args=(name,), daemon=True) for name in ("stdout", "stderr")
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        with getattr(self._process, name) as stream:
            for line in stream:
                with self._changed:
                    self._lines[name].append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def text(self) -> str:
        """Everything it has written so far."""
        with self._changed:
            return "".join(self._lines["stdout"] + self._lines["stderr"])

    def wait_line(self, pattern: str, timeout_s: float = PROMPT_S) -> re.Match[str]:
        """Wait for a line of output that matches; fails at once when the command ends without one."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for lines in self._lines.values():
                    for line in lines:
                        if found := re.search(pattern, line):
                            return found
                over = not any(reader.is_alive() for reader in self._readers)
                left_s = deadline_s - time.monotonic()
                if over or left_s <= 0:
                    break
                self._changed.wait(min(left_s, 0.5))
        raise AssertionError(f"no line matches {pattern!r} ({'ended' if over else 'timeout'}):\n{self.text}")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = PROMPT_S) -> None:
        """Look until ``condition`` holds; fails at once when the command ends before."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert not self.over, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline_s, f"no {what} within {timeout_s:g} s:\n{self.text}"
            with self._changed:
                self._changed.wait(0.02)

    def children(self) -> dict[str, int]:
        """The processes of the job by ``worker/…`` (in no known order) and ``server/index``."""
        found = {}
        for pid in map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()):
            if "downpour_server" in command_of(pid):
                config = environment_of(pid)[b"DOWNPOUR_SHARD"]
                found[f"server/{json.loads(config)['shard']}"] = pid
            else:
                found[f"worker pid {pid}"] = pid
        return found

    def interrupt(self) -> float:
        """Ctrl-C: SIGINT to the foreground process group. Gives the time."""
        os.killpg(self.pid, signal.SIGINT)
        return time.monotonic()

    def kill(self) -> None:
        """SIGKILL to the launcher alone."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self, timeout_s: float = 40.0) -> Ended:
        """Wait for the end."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.abandon()
            raise AssertionError(f"still running after {timeout_s:g} s:\n{self.text}") from None
        wall_s = time.monotonic() - self._started_s
        for reader in self._readers:
            reader.join(GONE_S)
        with self._changed:
            stdout, stderr = ("".join(self._lines[name]) for name in ("stdout", "stderr"))
        return Ended(code, stdout, stderr, wall_s, self.out)

    def abandon(self) -> None:
        """Get rid of the command, however the test ended."""
        if not self.over:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(GONE_S)


# ---------------------------------------------------------------- one test


class Box:
    """A working folder, a temporary folder and a mark for the processes of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.tmpdir = Path(tempfile.mkdtemp(prefix="dptest-", dir="/tmp"))
        self.leaves_runtime_folder = False
        """Set by the tests that kill the launcher itself, which then cannot tidy up."""
        self._segments = segments()
        self._started: list[Running] = []
        for source in SCRIPTS.iterdir():
            if source.is_file():
                shutil.copy(source, folder)
            elif source.name != "__pycache__":
                shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))

    def environment(self, **extra: str) -> dict[str, str]:
        """What the processes of this test get."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DOWNPOUR_")}
        return {**kept, "TMPDIR": str(self.tmpdir), MARK: self.mark, **extra}

    def start(self, *arguments: str, out: str | Path = "out", **environment: str) -> Running:
        """``downpour run --out OUT ARGUMENTS`` in the folder."""
        command = [sys.executable, "-m", "downpour_deploy", "run", "--out", str(out), *arguments]
        return self.command(command, self.folder / out, **environment)

    def command(self, command: Sequence[str], out: Path, **environment: str) -> Running:
        """Any command in the folder."""
        running = Running(command, self.folder, self.environment(**environment), out)
        self._started.append(running)
        return running

    def benchmark(self, name: str, *arguments: str, **environment: str) -> Running:
        """``benchmarks/NAME.py ARGUMENTS`` in the folder."""
        return self.command([sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments], self.folder, **environment)

    def run(self, *arguments: str, out: str | Path = "out", **environment: str) -> Ended:
        """:meth:`start`, then wait for the end."""
        return self.start(*arguments, out=out, **environment).end()

    def processes(self) -> list[int]:
        """The living processes of this test."""
        return marked(self.mark)

    def wait_gone(self, pids: Sequence[int], timeout_s: float) -> list[int]:
        """See :func:`wait_gone`."""
        return wait_gone(pids, timeout_s)

    def close(self) -> None:
        """End what is left, then assert that nothing was."""
        hanging = [running.pid for running in self._started if not running.over]
        for running in self._started:
            running.abandon()
        late = wait_gone(self.processes(), 0.0 if hanging else GONE_S)
        left = {pid: command_of(pid) for pid in late}
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        wait_gone(late, GONE_S)
        folders = sorted(entry.name for entry in self.tmpdir.rglob("downpour-*"))
        orphans = orphaned_segments(self._segments)
        shutil.rmtree(self.tmpdir, ignore_errors=True)
        assert not hanging, "the test ended before its command"
        assert not left, f"processes left behind: {left}"
        assert self.leaves_runtime_folder or not folders, f"runtime folders left behind: {folders}"
        assert not orphans, f"shared memory left behind: {orphans}"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """A box for one test."""
    box = Box(tmp_path)
    yield box
    box.close()


@pytest.fixture(scope="module")
def make_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Box]]:
    """Boxes for runs that several tests of a module look at; the run's fixture closes its box."""
    made: list[Box] = []

    def make() -> Box:
        made.append(Box(tmp_path_factory.mktemp("box")))
        return made[-1]

    yield make
    for box in made:
        if box.tmpdir.exists():
            box.close()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="dpdisk-", dir="/tmp"))
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    try:
        if mounted.returncode:
            pytest.skip(f"a small disk needs the right to mount a tmpfs: {mounted.stderr.strip()}")
        yield folder
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
