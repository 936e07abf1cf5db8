"""Kills leaders again and again in real jobs with --replication 2, and asks the ledger what became of it.

    python tests/chaos/leaders.py [--kills N] [--per-job K] [--frozen] [--transport ipc|tcp] [--no-shared-memory] …

A leader is killed whenever its backup could take over, a moment by lot later; now and then the backup, too. No push
that was answered may be missing, none applied twice, no restart spent. Told is the time from a kill to the answer to
the first push that was begun after it. Exit code 0 if all that is so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

import oracles  # noqa: E402

from downpour_common.names import process_name, server_index  # noqa: E402

SLOTS = SHARDS = 2
STEPS = 6000
LIMIT_S = 90.0


class Job:
    """One ``downpour run`` of the ledger."""

    def __init__(self, folder: Path, options: list[str], steps: int) -> None:
        self.folder, self.steps, self.out = folder, steps, folder / "out"
        self._read = 0
        self.backups: set[tuple[int, int]] = set()
        """(shard, server process) of backups that could take over"""
        self.leads: dict[int, int] = {shard: shard for shard in range(SHARDS)}
        script = [str(HERE / "workloads" / "ledger.py"), str(folder / "notes"), "--steps", str(steps)]
        command = [sys.executable, "-m", "downpour_deploy", "run", "-w", str(SLOTS), "-s", str(SHARDS)]
        command += ["--threads", "1", "--replication", "2", "--out", str(self.out), "--json"]
        command += ["--set", "timeout_s=40", "--set", "checkpoint_s=5", *options, *script]
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                [*command, "--rows", str(SHARDS), "--slots", str(SLOTS)],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def news(self) -> None:
        """What has become of leaders and backups, from the metrics."""
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = text[self._read :].rpartition("\n")[0]
        self._read += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            row = json.loads(line)
            if "backup" in row:
                process = server_index(row["backup"].partition("/")[2], SHARDS)
                self.backups.add((process % SHARDS, process))
            if "leads" in row:
                process = server_index(row["leads"].partition("/")[2], SHARDS)
                self.leads[process % SHARDS] = process

    def pid(self, process: int) -> int:
        """Of the newest process with this index."""
        found: list[tuple[int, int]] = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdecimal() or f"\nPPid:\t{self.process.pid}\n" not in (entry / "status").read_text():
                    continue
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in variables:
                if variable.startswith(b"DOWNPOUR_SHARD="):
                    config = json.loads(variable.partition(b"=")[2])
                    if config["process"] == process:
                        found.append((config["shard_epoch"], int(entry.name)))
        return max(found)[1] if found else 0

    def book(self, slot: int) -> bytes:
        """What worker ``slot`` has noted."""
        path = self.folder / "notes" / f"book-{slot}.bin"
        return path.read_bytes() if path.exists() else b""

    def answered_after(self, killed_s: float, before: list[int]) -> float:
        """Seconds from ``killed_s`` to the answer of the first push that each worker has begun since."""
        open_slots = set(range(SLOTS))
        worst_s = 0.0
        while open_slots and time.monotonic() - killed_s < LIMIT_S:
            for slot in list(open_slots):
                new = self.book(slot)[before[slot] :]
                entries = [new[i : i + 5] for i in range(0, len(new) - 4, 5)]
                begun = next((e for e in entries if e[:1] == b"b"), b"")
                if begun and b"a" + begun[1:] in entries:
                    worst_s = max(worst_s, time.monotonic() - killed_s)
                    open_slots.discard(slot)
            time.sleep(0.001)
            if self.process.poll() is not None:
                break
        return worst_s if not open_slots else -1.0


def run_job(folder: Path, options: argparse.Namespace, lot: random.Random, times_s: list[float]) -> list[str]:
    """One job from its start to its end; what is wrong."""
    extra = ["--set", f"transport={options.transport}", "--set", f"shared_memory={not options.no_shared_memory}"]
    job = Job(folder, extra, options.steps)
    kills = 0
    deadline_s = time.monotonic() + 20.0 + options.per_job * 20.0
    try:
        while job.process.poll() is None and kills < options.per_job and time.monotonic() < deadline_s:
            job.news()
            ready = sorted((shard, process) for shard, process in job.backups if len(job.book(0)) > 50)
            if not ready or min(len(job.book(slot)) for slot in range(SLOTS)) > 10 * options.steps - 2000:
                time.sleep(0.005)
                continue
            shard, backup = lot.choice(ready)
            time.sleep(lot.uniform(0.0, 0.15))
            leader = job.leads[shard]
            victim = backup if lot.random() < options.backups else leader
            pid = job.pid(victim)
            if not pid:
                continue
            before = [len(job.book(slot)) for slot in range(SLOTS)]
            killed_s = time.monotonic()
            os.kill(pid, signal.SIGSTOP if options.frozen else signal.SIGKILL)
            job.backups.discard((shard, backup))
            kills += victim == leader
            took_s = job.answered_after(killed_s, before)
            if victim == leader and took_s >= 0.0:
                times_s.append(took_s)
            name = process_name("server", victim, SHARDS)
            print(f"  {name} ({'leader' if victim == leader else 'backup'}): answered after {took_s:.3f} s", flush=True)
        code = job.process.wait(LIMIT_S + options.steps * 0.05)
    except subprocess.TimeoutExpired:
        return [f"the job hangs: {(folder / 'stderr').read_text()[-1500:]}"]
    finally:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()
    if code:
        return [f"exit code {code}: {(folder / 'stderr').read_text()[-1500:]}"]
    ledger = oracles.ledger_of(job.out, folder / "notes", SLOTS, options.steps)
    document = json.loads((folder / "stdout").read_text())
    found = list(ledger.wrong())
    found += [f"shard {i} has lost {len(lost)} answered pushes" for i, lost in enumerate(ledger.lost()) if lost]
    found += [f"{document[name]} {name}" for name in ("restarts", "lost_pushes") if document[name]]
    options.done += kills
    return found


def main() -> int:
    """See the module; an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-job", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--backups", type=float, default=0.15, help="share of the signals that backups get")
    parser.add_argument("--transport", default="ipc")
    parser.add_argument("--no-shared-memory", action="store_true")
    parser.add_argument("--frozen", action="store_true", help="SIGSTOP instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    options.done = 0
    lot, times_s, wrong = random.Random(options.seed), list[float](), list[str]()
    while options.done < options.kills and not wrong:
        folder = Path(tempfile.mkdtemp(prefix="downpour-leaders-"))
        print(f"{options.done} kills so far; files: {folder}", flush=True)
        wrong = run_job(folder, options, lot, times_s)
        if not wrong:
            shutil.rmtree(folder, ignore_errors=True)
    times_s.sort()
    answer = {
        "kills": options.done,
        "wrong": wrong[:5],
        "median_s": round(times_s[len(times_s) // 2], 3) if times_s else None,
        "p95_s": round(times_s[int(len(times_s) * 0.95)], 3) if times_s else None,
        "max_s": round(times_s[-1], 3) if times_s else None,
    }
    print(json.dumps(answer))
    if options.json:
        Path(options.json).write_text(json.dumps(answer) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
