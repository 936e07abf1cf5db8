"""Memory that a worker shares with the shards of its host.

It is an anonymous file (memfd): no name in any folder, so nothing is left behind however the processes end, and no
limit of ``/dev/shm``. A process of the same user reaches it through ``/proc/PID/fd/FD`` of its maker.
"""

from __future__ import annotations

import mmap
import os
import secrets
from dataclasses import dataclass

from downpour_common.layout import NONCE_BYTES, SharedLayout


@dataclass(slots=True)
class OfferedMemory:
    """The maker's side. ``fd`` is open until :meth:`close_fd`; the mapping lives as long as it is referenced."""

    view: memoryview
    fd: int
    nonce: bytes

    def close_fd(self) -> None:
        """Nobody else will map it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def offer(layout: SharedLayout) -> OfferedMemory | None:
    """Make memory for ``layout``, all zero but for a fresh nonce; None where the system cannot."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        fd = os.memfd_create("downpour", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        os.ftruncate(fd, layout.nbytes)
        view = memoryview(mmap.mmap(fd, layout.nbytes))
    except OSError:
        os.close(fd)
        return None
    nonce = secrets.token_bytes(NONCE_BYTES)
    view[layout.nonce_at :] = nonce
    return OfferedMemory(view, fd, nonce)


def attach(layout: SharedLayout, pid: int, fd: int, nonce: bytes) -> memoryview | None:
    """Map what another process offered; None when it cannot be reached or is not what it should be.

    A process in another network namespace counts as one of another host, even where its memory can be reached.
    """
    if not _same_network(pid):
        return None
    try:
        ours = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(ours).st_size != layout.nbytes:
            return None
        view = memoryview(mmap.mmap(ours, layout.nbytes))
    except (OSError, ValueError):
        return None
    finally:
        os.close(ours)
    return view if bytes(view[layout.nonce_at :]) == nonce else None


def _same_network(pid: int) -> bool:
    """Whether a process is in this one's network namespace; True where that cannot be told."""
    try:
        ours, theirs = os.stat("/proc/self/ns/net"), os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return True
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
