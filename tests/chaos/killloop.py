"""The kill loop: real jobs, in which processes are killed and stopped at random, and oracles that tell what came out.

    python tests/chaos/killloop.py [--minutes M | --count N] [--jobs J] [--kinds sync,async …] [--seed S] [--json FILE]
    python tests/chaos/killloop.py --replay KIND:SEED      the same schedule once more, with its output

Every schedule follows from its kind and its seed (see ``schedules.py``); the moment at which a signal arrives does not,
so that a replay may have to be repeated. ``bitwise``: final weights, optimizer state and versions must equal those of a
run in which nothing happens. ``ledger``: no push is applied twice, and those that are lost are the ones that the job
reports. ``census``: each sample is trained once in each pass. Exit code 0 if all that was tried has passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "process")]

import oracles  # noqa: E402
from cluster_kit import Cluster  # noqa: E402
from schedules import KINDS, PASSES, SAMPLES, STEPS, Schedule, draw  # noqa: E402

from downpour_common.errors import DownpourError  # noqa: E402

LIMIT_S = 120.0
"""A job that takes longer hangs: undisturbed ones take some seconds."""
RESTARTS = 30
DEFAULT_KINDS = [name for name, kind in KINDS.items() if kind.replication == 1]


class Wrong(Exception):
    """An oracle has been contradicted, or a job did not end as it must."""


@dataclass(slots=True)
class Tally:
    """What came out so far, by kind. For several threads."""

    passed: Counter[str] = field(default_factory=Counter)
    failed: list[dict[str, Any]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "schedules": self.passed.total() + len(self.failed),
            "passed": dict(self.passed),
            "failed": self.failed,
            "kills_in_passed": dict(self.kills),
            "pushes_lost_and_reported": dict(self.lost),
            "mean_s": {kind: round(self.seconds[kind] / n, 1) for kind, n in self.passed.items()},
        }


# ---------------------------------------------------------------- one schedule


def script_of(schedule: Schedule, folder: Path) -> list[str]:
    """The workload with its arguments."""
    match KINDS[schedule.kind].oracle:
        case "bitwise":
            norm = ["--norm"] if schedule.norm else []
            return ["bitwise.py", "--passes", str(PASSES), "--samples", str(SAMPLES), *norm]
        case "census":
            counts = ["--passes", str(PASSES), "--samples", str(SAMPLES), "--rows", str(schedule.shards)]
            return ["census.py", str(folder / "notes"), *counts]
        case _:
            counts = ["--steps", str(STEPS), "--rows", str(schedule.shards), "--slots", str(schedule.workers)]
            return ["ledger.py", str(folder / "notes"), *counts]


def command_of(schedule: Schedule, folder: Path, faults: bool = True) -> list[str]:
    """``downpour run`` with all that the schedule asks for."""
    kind, script = KINDS[schedule.kind], script_of(schedule, folder)
    options = ["-w", str(schedule.workers), "-s", str(schedule.shards), "--mode", kind.mode, "--threads", "1"]
    options += ["--restarts", str(RESTARTS), "--out", str(folder / "out"), "--json", "--set", "timeout_s=40"]
    options += ["--set", f"checkpoint_s={schedule.checkpoint_s}", "--set", f"transport={schedule.transport}"]
    if kind.replication > 1:
        options += ["--replication", str(kind.replication)]
    mine = [str(f) for f in schedule.faults if f.role != "coordinator"]
    if mine and faults:
        options += ["--chaos", ",".join(mine)]
    program = [sys.executable, "-m", "downpour_deploy", "run"]
    return [*program, *options, str(HERE / "workloads" / script[0]), *script[1:]]


def run_command(command: list[str], folder: Path, failpoints: str = "", kill_after_s: float | None = None) -> int:
    """Run it; its exit code. ``kill_after_s``: it is killed so long after training has begun."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DOWNPOUR_")}
    environment["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir(exist_ok=True)
    if failpoints:
        environment["DOWNPOUR_FAILPOINTS"] = failpoints
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "ab") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            if kill_after_s is not None:
                _await_training(process, folder)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(kill_after_s)
                process.kill()
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Wrong(f"the job hangs: it has not ended within {LIMIT_S:g} s") from None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # its processes die with it
            process.wait()


def _await_training(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until a worker has said that it begins."""
    deadline_s = time.monotonic() + LIMIT_S
    before = (folder / "stderr").read_text(errors="replace").count(" begins ")
    while process.poll() is None and (folder / "stderr").read_text(errors="replace").count(" begins ") <= before:
        if time.monotonic() > deadline_s:
            raise Wrong("training does not begin")
        time.sleep(0.05)


class References:
    """Digests of runs in which nothing happens, each computed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[Any, ...], str] = {}
        self._lock = threading.Lock()

    def of(self, schedule: Schedule) -> str:
        """What ``schedule`` must come to. ipc and tcp, and a cluster, compute the same."""
        key = (schedule.workers, schedule.shards, schedule.norm)
        with self._lock:
            if key not in self._known:
                folder = self._folder / f"reference-{len(self._known)}"
                folder.mkdir()
                plain = Schedule(0, "sync", *key, 60.0, "ipc", ())
                code = run_command(command_of(plain, folder, faults=False), folder)
                if code:
                    raise RuntimeError(f"the run without faults fails: see {folder}")
                self._known[key] = oracles.digest_of(folder / "out", buffers=False)
            return self._known[key]


def judge(schedule: Schedule, out: Path, folder: Path, document: dict[str, Any], references: References) -> int:
    """Ask the oracle; pushes that were lost, and reported. Raises :class:`Wrong`."""
    kind = KINDS[schedule.kind]
    if kind.oracle == "bitwise":
        found, expected = oracles.digest_of(out, buffers=False), references.of(schedule)
        if found != expected:
            raise Wrong(f"weights, optimizer state or versions differ from the run without faults: {found[:12]}")
        return 0
    begun_again = any("was started again from" in text for text in document.get("warnings", []))
    if kind.oracle == "census":
        synchronous = kind.mode == "sync"
        if problems := oracles.census_problems(out, folder / "notes", PASSES, SAMPLES, synchronous, begun_again):
            raise Wrong(f"{len(problems)} problems: {'; '.join(problems[:5])}")
        return 0
    ledger = oracles.ledger_of(out, folder / "notes", schedule.workers, STEPS)
    if wrong := ledger.wrong():
        raise Wrong(f"{len(wrong)} entries of the ledger: {'; '.join(wrong[:5])}")
    lost = [len(pushes) for pushes in ledger.lost()]
    if kind.replication > 1 and any(lost):
        raise Wrong(f"acknowledged pushes were lost, by shard: {lost}")
    if kind.exact and not begun_again:
        reported = reported_losses(document, schedule.shards)
        if reported != lost:
            raise Wrong(f"pushes lost by shard: {lost}, reported: {reported}")
    return sum(lost)


def reported_losses(document: dict[str, Any], shards: int) -> list[int]:
    """By shard, from ``--json``: contributions to chunks, of which a shard of the ledger has one."""
    losses = document.get("lost", {})
    return [int(losses.get(f"server/{i}", 0)) for i in range(shards)]


def run_schedule(schedule: Schedule, folder: Path, references: References, cluster: ClusterOfThread) -> int:
    """One schedule from beginning to end; see :func:`judge`."""
    kind = KINDS[schedule.kind]
    if kind.where == "cluster":
        out, document = cluster.run(schedule, folder)
        return judge(schedule, out, folder, document, references)
    failpoints = ";".join(schedule.failpoints)
    command = command_of(schedule, folder)
    code = -1
    if kind.where == "resume":
        for fault in (f for f in schedule.faults if f.role == "coordinator"):
            code = run_command(command, folder, failpoints, kill_after_s=fault.after_s)
            if code == 0:
                break
            if list((folder / "out" / "checkpoints").glob("*/manifest.json")):
                command = [*command_of(schedule, folder)[: -len(script_of(schedule, folder))]]
                command += ["--resume", str(folder / "out"), *command_of(schedule, folder)[len(command) :]]
            else:
                shutil.rmtree(folder / "out")
    if code:
        code = run_command(command, folder, failpoints)
    if code:
        raise Wrong(f"exit code {code}: {_end_of(folder / 'stderr')}")
    return judge(schedule, folder / "out", folder, json.loads((folder / "stdout").read_text()), references)


def _end_of(path: Path) -> str:
    return path.read_text(errors="replace")[-1500:]


# ---------------------------------------------------------------- with daemons


class ClusterOfThread:
    """A cluster of real daemons on loopback for the schedules of one thread, made when the first one needs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cluster: Cluster | None = None

    def close(self) -> None:
        """End the daemons."""
        if self._cluster is not None:
            cluster, self._cluster = self._cluster, None
            cluster.close()

    def run(self, schedule: Schedule, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The job's folder and document. Raises :class:`Wrong`."""
        try:
            return self._run(schedule, folder)
        except (AssertionError, DownpourError) as error:
            cluster, self._cluster = self._cluster, None  # it may be in any state
            if cluster is not None:
                cluster.show()
                cluster.close()
            raise Wrong(str(error)) from None

    def _run(self, schedule: Schedule, folder: Path) -> tuple[Path, dict[str, Any]]:
        if self._cluster is None:
            here = Path(tempfile.mkdtemp(prefix="cluster-", dir=self._folder))
            self._cluster = Cluster(here, keys=False)
            self._cluster.start_coordinator()
            agents = {"s1": ("server",), "w1": ("worker", "--slots", "3")}
            self._cluster.start_agents(agents)
        cluster, script = self._cluster, script_of(schedule, folder)
        job = cluster.submit(
            HERE / "workloads" / script[0],
            *script[1:],
            workers=schedule.workers,
            shards=schedule.shards,
            mode=KINDS[schedule.kind].mode,
            restarts=RESTARTS,
            settings={"checkpoint_s": schedule.checkpoint_s, "timeout_s": 40},
        )
        cluster.running(job, 0)
        begun_s = time.monotonic()
        stopped: list[tuple[float, int]] = []
        for fault in schedule.faults:
            while time.monotonic() - begun_s < fault.after_s:
                time.sleep(0.01)
                stopped = _wake(stopped, time.monotonic() - begun_s)
            if fault.role == "coordinator":
                assert cluster.coordinator is not None
                cluster.coordinator.kill()
                cluster.start_coordinator()
                continue
            pid = cluster.processes(job).get(f"{fault.role}/{fault.index}")
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
                if fault.action == "stop":
                    stopped.append((fault.after_s + fault.lasts_s, pid))
        while stopped:
            time.sleep(0.01)
            stopped = _wake(stopped, time.monotonic() - begun_s)
        document = cluster.ended(job, timeout_s=LIMIT_S)
        return cluster.files(job), document


def _wake(stopped: list[tuple[float, int]], after_s: float) -> list[tuple[float, int]]:
    for _, pid in [entry for entry in stopped if entry[0] <= after_s]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return [entry for entry in stopped if entry[0] > after_s]


# ---------------------------------------------------------------- many schedules


def try_one(seed: int, kind: str, base: Path, tally: Tally, references: References, cluster: ClusterOfThread) -> bool:
    """Run a schedule and note what came out; whether it passed."""
    schedule = draw(seed, kind)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{seed}-", dir=base))
    began_s = time.monotonic()
    try:
        lost = run_schedule(schedule, folder, references, cluster)
    except Wrong as error:
        replay = f"python tests/chaos/killloop.py --replay {kind}:{seed}"
        row = {"kind": kind, "seed": seed, "schedule": str(schedule), "error": str(error), "replay": replay}
        with tally.lock:
            tally.failed.append({**row, "folder": str(folder)})
        print(f"FAILED {kind}:{seed}  {schedule}\n  {error}\n  files: {folder}\n  again: {replay}", flush=True)
        return False
    with tally.lock:
        tally.passed[kind] += 1
        tally.kills.update(schedule.kills)
        tally.lost[kind] += lost
        tally.seconds[kind] += round(time.monotonic() - began_s)
        count = tally.passed.total()
    print(f"passed {count}: {kind}:{seed} in {time.monotonic() - began_s:.1f} s  {schedule}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def loop(options: argparse.Namespace, base: Path, tally: Tally) -> None:
    """Schedules until time or count is up, by several threads; kinds take turns.

    The first SIGTERM or Ctrl-C lets those under way come to their end, so that their processes do; the second ends it.
    """
    end_s = time.monotonic() + options.minutes * 60.0
    stopping = threading.Event()

    def stop(number: int, _frame: object) -> None:
        stopping.set()
        signal.signal(number, signal.SIG_DFL)
        print("no more schedules; those under way come to their end", flush=True)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    references = References(base)
    lock = threading.Lock()
    upcoming = iter(range(options.seed, options.seed + options.count))

    def work(thread: int) -> None:
        cluster = ClusterOfThread(base)
        try:
            while time.monotonic() < end_s and not stopping.is_set():
                with lock:
                    number = next(upcoming, None)
                if number is None or (options.failures and len(tally.failed) >= options.failures):
                    return
                kind = options.kinds[number % len(options.kinds)]
                try_one(number, kind, base, tally, references, cluster)
        finally:
            cluster.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """See the module; an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--count", type=int, default=1_000_000, help="schedules at most")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="at the same time")
    parser.add_argument("--kinds", default=",".join(DEFAULT_KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--failures", type=int, default=10, help="end after so many; 0: never")
    parser.add_argument("--replay", default="", help="KIND:SEED")
    parser.add_argument("--json", default="", help="write the summary here, too")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"unknown kinds {unknown}; known are {', '.join(KINDS)}")
    base = Path(tempfile.mkdtemp(prefix="downpour-killloop-", dir="/tmp"))
    tally = Tally()
    if options.replay:
        kind, _, seed = options.replay.rpartition(":")
        cluster = ClusterOfThread(base)
        try:
            try_one(int(seed), kind, base, tally, References(base), cluster)
        finally:
            cluster.close()
    else:
        loop(options, base, tally)
    text = json.dumps(tally.document(), indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")
    if not tally.failed:
        shutil.rmtree(base, ignore_errors=True)
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
