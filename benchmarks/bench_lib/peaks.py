"""Peak memory of running processes.

``VmHWM`` is the kernel's own peak of what is resident, so nothing is missed. It counts shared pages in every process
that has them mapped: libraries' pages, which all processes with torch have in common, and a worker's weights and
gradients in shared memory, which shards map too. So a worker's ``VmHWM`` is compared with the plain script's, which
has the same libraries; and of a shard, to count everything once and where it belongs, the largest sample of
``RssAnon`` is taken, which leaves both out.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_lib.idle import descendants

EVERY_S = 0.01
ROLL_CALL = 25


@dataclass
class Peak:
    """Of one process so far, in bytes."""

    resident: int = 0
    """exact; shared memory included"""
    own: int = 0
    """sampled; neither shared memory nor pages of files"""


class Watch:
    """Looks at the processes that ``roots`` names, and at all below them, until the block ends."""

    def __init__(self, roots: Callable[[], list[int]]) -> None:
        self.peaks: dict[int, Peak] = {}
        """by process id"""
        self._roots = roots
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        known: set[int] = set()
        for number in itertools.count():
            if self._over.wait(EVERY_S):
                return
            if number % ROLL_CALL == 0:  # it looks at every process of the machine
                known = {pid for root in self._roots() for pid in (root, *descendants(root))}
            for pid in known:
                self.look(pid)

    def look(self, pid: int) -> None:
        """Take one process as it is now; one that has ended does not matter."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        if "VmHWM" not in fields:  # it is ending
            return
        resident, own = (int(fields[key][0]) * 1024 for key in ("VmHWM", "RssAnon"))
        peak = self.peaks.setdefault(pid, Peak())
        peak.resident = max(peak.resident, resident)
        peak.own = max(peak.own, own)
