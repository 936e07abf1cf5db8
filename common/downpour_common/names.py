"""What processes are called, for people: ``server/0`` and, with replication, ``server/0b``, the shard's second one."""

from __future__ import annotations

import re

_SECOND = "b"
_NAME = re.compile(r"(\d{1,9})(b?)")


def process_name(role: str, index: int, shards: int = 0) -> str:
    """``worker/1``, ``server/0``; ``server/0b`` is the server process with index ``shards`` + 0."""
    if role == "server" and 0 < shards <= index:
        return f"server/{index % shards}{_SECOND}"
    return f"{role}/{index}"


def server_index(text: str, shards: int) -> int:
    """Index of the server process that is called ``0`` or ``0b``. Raises :class:`ValueError`."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text or 'nothing'} is no number of a server")
    return int(found[1]) + (shards if found[2] else 0)
