"""Checks that idle contenders are idle: what the benchmark's processes use while nobody has a turn."""

from __future__ import annotations

import os
import time
from pathlib import Path

PROC = Path("/proc")
PPID, UTIME, STIME, STARTED = 1, 11, 12, 19  # fields of /proc/PID/stat, counted from the state that follows the name


def descendants_load(watch_s: float) -> float:
    """Cores used over `watch_s` by all processes below this one, for instance 1.0 for one that spins."""
    before = _ticks_of_descendants()
    time.sleep(watch_s)
    after = _ticks_of_descendants()
    ticks = sum(after[pid] - before[pid] for pid in after.keys() & before.keys())
    return ticks / os.sysconf("SC_CLK_TCK") / watch_s


def descendants(pid: int) -> dict[int, list[str]]:
    """The processes below one, with the fields of their ``stat`` that follow the name."""
    stats = {int(entry.name): _stat(entry) for entry in PROC.iterdir() if entry.name.isdigit()}
    known = {pid}
    found: dict[int, list[str]] = {}
    grown = True
    while grown:
        grown = False
        for each, fields in stats.items():
            if fields and each not in found and int(fields[PPID]) in known:
                known.add(each)
                found[each] = fields
                grown = True
    return found


def _ticks_of_descendants() -> dict[int, int]:
    """Processor time in clock ticks, by process id."""
    return {pid: int(fields[UTIME]) + int(fields[STIME]) for pid, fields in descendants(os.getpid()).items()}


def _stat(entry: Path) -> list[str]:
    """The fields after the process's name, which may itself hold blanks; empty when it has just ended."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
