"""What a shard's state machine asks its process to do."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common import messages as m
from downpour_common.messages import Message
from downpour_common.transport import Peer, Sent
from downpour_server.snapshot import WriteSnapshot
from downpour_server.store import StoredChunk

NOBODY = b""
"""Who has sent what a follower takes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Send ``message`` to ``peer``."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class SendWeights:
    """Send ``stored``'s weights as they are at this moment, and tell ``stored.being_read``.

    ``previous``: those of the version before, as they are at this moment.
    """

    peer: Peer
    request: int
    stored: StoredChunk
    previous: bool = False


@dataclass(frozen=True, slots=True)
class Attach:
    """Map the memory that ``offer`` describes and tell :meth:`downpour_server.shard.Shard.attached`."""

    peer: Peer
    offer: m.AttachMemory


@dataclass(slots=True)
class Kept:
    """Weights that wait to be sent: they stay as they are until they have been (see ``StoredChunk.being_read``)."""

    sent: Sent | None = None

    @property
    def done(self) -> bool:
        """Whether they have been sent, and the transport no longer reads them."""
        return self.sent is not None and self.sent.done


@dataclass(frozen=True, slots=True)
class SendKept:
    """Send these weights, which have waited, and tell ``kept``."""

    peer: Peer
    message: m.Weights
    kept: Kept


@dataclass(frozen=True, slots=True)
class Tell:
    """Send ``message`` to the coordinator."""

    message: Message


Effect = Reply | SendWeights | SendKept | Tell | WriteSnapshot | Attach
