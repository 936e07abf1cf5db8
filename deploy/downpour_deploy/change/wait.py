"""Has a job changed and waits until it trains so. The wish has a token and is said again with it, like that for a
checkpoint (:mod:`downpour_deploy.checkpoint.now`): so it outlives a coordinator that is restarted, and is met once."""

from __future__ import annotations

import secrets

from downpour.jobs.client import ClusterClient
from downpour_common import exitcodes
from downpour_common.errors import ProtocolError
from downpour_common.messages import Document

ASK_S, ASK_MAX_S = 0.05, 0.5


def await_change(client: ClusterClient, job: str, assignments: tuple[str, ...], timeout_s: float) -> Document:
    """Ask for the change; what there is of it when the job trains with it, or will not, or after ``timeout_s``:
    ``job``, ``state`` (waiting, changing, changed, failed), ``number`` of the checkpoint, ``error``, ``mode`` in force.
    Raises what the client raises."""
    token = secrets.token_hex(16)
    until_s, pause_s = client.now() + timeout_s, ASK_S
    while True:
        found = client.set(job, token, assignments)
        if type(found.get("number")) is not int or not isinstance(found.get("error"), str) or "job" not in found:
            raise ProtocolError("the answer to SetJob is malformed")
        left_s = until_s - client.now()
        if found.get("state") in ("changed", "failed") or left_s <= 0:
            return found
        client.pause(min(pause_s, left_s))
        pause_s = min(2 * pause_s, ASK_MAX_S)


def exit_code(found: Document) -> int:
    """Of :func:`await_change`'s answer."""
    return {"changed": exitcodes.OK, "failed": exitcodes.FAILED}.get(found["state"], exitcodes.NOT_FINISHED)
