"""How messages travel. Two small interfaces, each with a ZeroMQ and an in-memory implementation.

Delivery: messages between one client and one server arrive in the order sent, at most once, or not at all (a
peer that died loses what was under way). Everything stronger (exactly once, deadlines) is made above, from
the identity in the payload.

Buffers: a payload given to ``send`` must stay unchanged until the receiver's *answer* has come back; on the
server's side, where nobody acknowledges answers, until :attr:`Sent.done`. A received payload belongs to the
receiver and stays valid as long as it is referenced.
"""

from __future__ import annotations

from typing import Protocol

from downpour_common.messages import Message

Peer = bytes
"""Names a connection at the server that accepted it; means nothing elsewhere and is never identity."""


class Sent(Protocol):
    """What became of a message handed to a transport."""

    @property
    def done(self) -> bool:
        """Whether the transport no longer reads the payload's memory."""


class ServerTransport(Protocol):
    """The answering side: many peers, one address."""

    address: str
    malformed: int
    """messages dropped because they could not be decoded"""

    def poll(self, timeout_s: float) -> list[tuple[Peer, Message]]:
        """Messages that have arrived; waits at most ``timeout_s`` for the first."""

    def send(self, peer: Peer, message: Message) -> Sent:
        """Queue ``message``; one to a peer that is gone is dropped."""

    def close(self) -> None:
        """Close at once; give queued messages a short time to leave."""


class ClientTransport(Protocol):
    """The asking side: one thread, several servers by address. Only :meth:`wake` may be called by others."""

    malformed: int

    def send(self, server: str, message: Message) -> None:
        """Queue ``message`` for the server at this address, connecting first if need be."""

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        """Messages that have arrived, with the server's address; waits at most ``timeout_s`` or until woken."""

    def forget(self, server: str) -> None:
        """Close the connection to the server at this address; what has not left does not leave."""

    def wake(self) -> None:
        """Make a :meth:`poll` under way in another thread return."""

    def close(self) -> None:
        """Close; gives queued messages a short time to leave."""
