"""A listening side on this host, in a process of its own as a shard would be."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from downpour_common import exitcodes
from downpour_common.keys import ROLES, new_keys
from downpour_common.process import die_with_parent, prepare_child
from downpour_common.transport.zeromq import new_key_pair
from downpour_deploy.bench.measure import LinkError

START_S = 30.0
END_S = 3.0


@contextmanager
def keys_for_now() -> Iterator[str]:
    """A folder with a set of keys that lasts as long as this."""
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        new_keys(Path(folder) / "keys", {role: new_key_pair() for role in ROLES})
        yield os.path.join(folder, "keys")


@contextmanager
def listener(folder: str | None) -> Iterator[str]:
    """The address of a listening side on loopback, with the keys of ``folder``; it ends with this."""
    command = [sys.executable, "-m", "downpour_deploy", "bench", "net", "--listen", "127.0.0.1:0", "--once", "--json"]
    command += ["--keys", folder] if folder is not None else ["--security", "none"]
    prepare_child()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
        preexec_fn=die_with_parent,  # noqa: PLW1509  it allocates nothing and takes no lock
    )
    try:
        yield f"tcp://{_address(process)}"
    finally:
        _end(process)


def _address(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    deadline_s = time.monotonic() + START_S
    line = b""
    while not line.endswith(b"\n"):
        left_s = max(0.0, deadline_s - time.monotonic())
        if not select.select([process.stdout], [], [], left_s)[0]:
            raise LinkError(exitcodes.FAILED, f"the listening side has not started within {START_S:g} s")
        part = os.read(process.stdout.fileno(), 4096)
        if not part:
            said = process.stderr.read().decode(errors="replace").strip().removeprefix("downpour: ")
            raise LinkError(exitcodes.USAGE, said or "the listening side has ended")
        line += part
    return str(json.loads(line)["address"])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
