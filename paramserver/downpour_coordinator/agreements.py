"""What the workers of a job agree on: by key, the first value that one of them proposes is everybody's.

Ranks of a replica find each other so (``group/REPLICA/EPOCH``: where they meet), and all replicas settle on one cut of
the model. Such a value is small, and is kept as long as the job's training, or as the processes of the replica that
its key names.
"""

from __future__ import annotations

import base64
import re

from downpour_common.errors import ProtocolError
from downpour_common.transport import Peer

LONGEST_KEY = 200
LARGEST_VALUE = 256 << 10
"""Bytes of one value."""
MOST_BYTES = 4 << 20
"""Bytes of all values and keys: they are written with the job's document each time it changes."""
_OF_REPLICA = re.compile(r".*/(\d{1,9})/(\d{1,18})")

Waiting = tuple[Peer, int]
"""Where a worker waits, and its request."""


class Agreements:
    """Of one job. Who waits is not kept beyond the process: it asks again."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._waiting: dict[str, dict[int, Waiting]] = {}
        """by key and slot"""

    def propose(self, key: str, value: bytes) -> dict[int, Waiting]:
        """``value`` is that of ``key`` if there is none yet; who has waited for it, by slot. Raises
        :class:`ProtocolError` for what is too large."""
        if key not in self.values:
            held = sum(len(k) + len(v) for k, v in self.values.items())
            if len(key) > LONGEST_KEY or len(value) > LARGEST_VALUE or held + len(key) + len(value) > MOST_BYTES:
                raise ProtocolError(
                    f"a key of {len(key)} characters and its {len(value)} bytes are too much to agree on"
                )
            self.values[key] = value
        return self._waiting.pop(key, {})

    def awaited(self, key: str) -> bool:
        """Whether somebody waits for a value of ``key``."""
        return bool(self._waiting.get(key))

    def wait(self, key: str, slot: int, peer: Peer, request: int) -> None:
        """``slot`` waits at ``peer`` for somebody's proposal; it may say so again."""
        if len(key) > LONGEST_KEY:
            raise ProtocolError(f"nobody agrees on a key of {len(key)} characters")
        for waiting in self._waiting.values():
            waiting.pop(slot, None)  # a worker asks for one thing after the other
        self._waiting.setdefault(key, {})[slot] = (peer, request)

    def replaced(self, slot: int, replica: int, epoch: int) -> None:
        """Another process is expected in ``slot``, of this epoch: what those before it have agreed on as a replica is
        over, and nobody waits there any more."""
        for waiting in self._waiting.values():
            waiting.pop(slot, None)
        for key in list(self.values):
            found = _OF_REPLICA.fullmatch(key)
            if found and int(found[1]) == replica and int(found[2]) < epoch:
                del self.values[key]

    def document(self) -> list[list[str]]:
        """Plain values, for the journal."""
        return [[key, base64.b64encode(value).decode()] for key, value in self.values.items()]

    @classmethod
    def from_document(cls, document: list[list[str]]) -> Agreements:
        """The inverse of :meth:`document`."""
        self = cls()
        self.values = {key: base64.b64decode(value) for key, value in document}
        return self
