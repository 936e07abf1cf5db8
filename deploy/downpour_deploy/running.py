"""How commands find a job of ``downpour run``: a file in its run directory, there while it runs, names its socket.

The socket is the coordinator's own, in a folder that only its user can enter (with ``transport=tcp`` a loopback port).
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass

from downpour_common.errors import CheckpointError

NAME = "running.json"


@dataclass(frozen=True, slots=True)
class Running:
    """A job under way: its id, and the coordinator's address."""

    job: str
    address: str


def write(out: str, job: str, address: str) -> None:
    """Say that ``job`` runs in the run directory ``out``. Raises ``OSError``."""
    path = os.path.join(out, NAME)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"job": job, "address": address, "pid": os.getpid()}, file)


def remove(out: str) -> None:
    """It does not run any more."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(out, NAME))


def read(out: str) -> Running | None:
    """The job that runs in ``out``, None without; a file left over by a launcher that was killed does not count.

    Raises :class:`CheckpointError` for one that makes no sense.
    """
    path = os.path.join(out, NAME)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        pid = int(found["pid"])
        running = Running(str(found["job"]), str(found["address"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's, but alive
    return running
