"""Tells the service manager (systemd) how the process is doing. Harmless where there is none."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> bool:
    """Send ``READY=1``, ``STOPPING=1``, ``STATUS=…``, one per line; whether there was anybody to tell.

    The receiver is the datagram socket named by ``NOTIFY_SOCKET``; a name that begins with @ is an abstract one.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(line.replace("\n", " ") for line in lines).encode(), address)
    except OSError:
        return False  # the manager has gone, or does not keep up; training does not depend on it
    return True
