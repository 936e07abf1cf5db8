"""`make chaos MINUTES=30`: the simulator with fresh seeds, the mutations, the degraded cases, and the kill loop, one
after the other. Of the time given the simulator has about a third and the kill loop what is left at the end.

Every run begins at other seeds (by the time of day; ``--seed`` to have the same again). Exit code 0 if all has passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BATCH = 400
"""Seeds of the simulator between two looks at the clock."""


def run(name: str, command: list[str], limit_s: float | None = None) -> bool:
    """Run a part, its output as it comes; whether it has passed. Past its limit it has not."""
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    try:
        return subprocess.run(command, timeout=limit_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"== {name}: not done within {limit_s:.0f} s", flush=True)
        return False


def simulate(first: int, until_s: float, jobs: int) -> tuple[int, bool]:
    """Seeds from ``first`` on until the time is up: how many, and whether all passed."""
    count, passed = 0, True
    while passed and (not count or time.monotonic() < until_s):
        seeds = ["--from", str(first + count), "--seeds", str(BATCH), "--jobs", str(jobs)]
        passed = run("simulator", [sys.executable, str(HERE / "simulate.py"), *seeds])
        count += BATCH
    return count, passed


def main() -> int:
    """See the module; an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="the kill loop has half of them")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000_000 * 10)
    options = parser.parse_args()
    began_s = time.monotonic()
    end_s = began_s + options.minutes * 60.0
    results: dict[str, object] = {"seed": options.seed}
    seeds, simulated = simulate(options.seed, began_s + options.minutes * 20.0, options.jobs)
    results["simulator"] = {"seeds": seeds, "passed": simulated}
    left_s = max(60.0, (end_s - time.monotonic()) / 3)
    results["mutations"] = run("mutations", [sys.executable, str(HERE / "mutations.py")], left_s)
    degraded = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "degraded.py")]
    results["degraded"] = run("degraded", degraded)
    minutes = max(0.5, (end_s - time.monotonic()) / 60.0)
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "killloop.json"
        loop = ["--minutes", f"{minutes:.1f}", "--jobs", str(max(1, options.jobs // 2)), "--seed", str(options.seed)]
        killed = run("kill loop", [sys.executable, str(HERE / "killloop.py"), *loop, "--json", str(summary)])
        results["kill loop"] = json.loads(summary.read_text()) if summary.exists() else {}
    print(json.dumps(results, indent=1))
    return 0 if simulated and results["mutations"] and results["degraded"] and killed else 1


if __name__ == "__main__":
    sys.exit(main())
