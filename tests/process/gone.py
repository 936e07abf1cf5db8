"""Waiting for processes to vanish."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence


def wait_gone(pids: Sequence[int], timeout_s: float) -> list[int]:
    """Wait for the processes to end; those that have not after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    late = []
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                late.append(pid)
        finally:
            os.close(descriptor)
    return late
