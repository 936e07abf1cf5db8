"""What a Downpour process asks of the operating system. Every call is harmless where it is not available."""

from __future__ import annotations

import ctypes
import functools
import signal
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_PR_SET_PDEATHSIG = 1
_KEEP_BYTES = 512 << 20


@functools.cache
def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    return ctypes.CDLL(None, use_errno=True)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it.

    Each received chunk is a fresh allocation; by default glibc maps and unmaps it, and the page faults cost more
    than the copy itself. Threads that begin after this share one arena, because what the other ones hold is returned
    whatever the thresholds are.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def return_freed_memory() -> None:
    """Have glibc return freed memory of a layer's size at once, for a process that is to stay small."""
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def prepare_child() -> None:
    """Warm up what :func:`die_with_parent` needs, so that it allocates nothing between fork and exec."""
    _libc()


def die_with_parent() -> None:
    """In a new child: be killed when the thread that started it ends, even by SIGKILL."""
    libc = _libc()
    if libc is not None and hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
