"""Has a checkpoint made and waits for it.

The wish has a token, and is said again with it until it is met: so it survives a coordinator that is restarted, and is
met once. A job of ``downpour run`` answers on its coordinator's socket like a coordinator of a cluster; a signal would
have no way to say what came of it.
"""

from __future__ import annotations

import secrets

from downpour.jobs.client import ClusterClient
from downpour_common import exitcodes
from downpour_common.errors import ProtocolError
from downpour_common.messages import Document

ASK_S, ASK_MAX_S = 0.02, 0.5


def await_commit(client: ClusterClient, job: str, timeout_s: float) -> Document:
    """Ask for a checkpoint of ``job``; what there is of it when it is committed, or can no longer be, or after
    ``timeout_s``: ``job``, ``state``, ``number`` (0: none has begun), ``error``. Raises what the client raises."""
    token = secrets.token_hex(16)
    until_s, pause_s = client.now() + timeout_s, ASK_S
    while True:
        found = client.checkpoint_now(job, token)
        if type(found.get("number")) is not int or not isinstance(found.get("error"), str) or "job" not in found:
            raise ProtocolError("the answer to CheckpointNow is malformed")
        left_s = until_s - client.now()
        if found.get("state") in ("committed", "failed") or left_s <= 0:
            return found
        client.pause(min(pause_s, left_s))
        pause_s = min(2 * pause_s, ASK_MAX_S)


def exit_code(found: Document) -> int:
    """Of :func:`await_commit`'s answer."""
    return {"committed": exitcodes.OK, "failed": exitcodes.FAILED}.get(found["state"], exitcodes.NOT_FINISHED)
