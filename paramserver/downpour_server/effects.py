"""What a shard's state machine asks its process to do."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common import messages as m
from downpour_common.messages import Message
from downpour_common.transport import Peer
from downpour_server.snapshot import WriteSnapshot
from downpour_server.store import StoredChunk


@dataclass(frozen=True, slots=True)
class Reply:
    """Send ``message`` to ``peer``."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class SendWeights:
    """Send ``stored``'s weights as they are at this moment, and tell ``stored.being_read``."""

    peer: Peer
    request: int
    stored: StoredChunk


@dataclass(frozen=True, slots=True)
class Attach:
    """Map the memory that ``offer`` describes and tell :meth:`downpour_server.shard.Shard.attached`."""

    peer: Peer
    offer: m.AttachMemory


Effect = Reply | SendWeights | WriteSnapshot | Attach
