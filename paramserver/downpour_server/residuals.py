"""What workers owe: the part of their gradients that codecs have left out so far, on its way into snapshots and back.

A snapshot of clock c (``sync``) has what each worker owes after its contribution c - 1. The shard asks for it right
before it answers that one, and the worker sends it before it encodes the next. One who has ended its pass owes what it
did then.
"""

from __future__ import annotations

from collections.abc import Mapping

from downpour_common import messages as m
from downpour_common.transport import Peer
from downpour_server.effects import Effect, Reply
from downpour_server.snapshot import Capture
from downpour_server.store import StoredChunk
from downpour_server.tensors import as_bytes, from_bytes


def ask(job: str, stored: StoredChunk, capture: Capture, peers: Mapping[int, Peer]) -> list[Effect]:
    """The chunk is in the snapshot, and the contributions of these slots, that they wait for an answer to, with it."""
    index = stored.chunk.index
    asked = capture.ask(index, peers)
    return [Reply(peers[slot], m.ResidualWanted(job, capture.snapshot, index)) for slot in asked]


def keep(message: m.Residual, stored: StoredChunk, capture: Capture | None) -> None:
    """What a worker owes ``stored``; the payload has its size."""
    if capture is not None and stored.coded_push:
        residual = from_bytes(message.payload, stored.chunk.dtype)
        capture.take_residual(message.snapshot, message.chunk, message.slot, residual)


def give(message: m.FetchResidual, stored: StoredChunk | None) -> m.ResidualKept:
    """What was owed at the checkpoint that the shard began with."""
    kept = None if stored is None or stored.coding is None else stored.coding.residuals.get(message.slot)
    return m.ResidualKept(message.request, message.chunk, b"" if kept is None else as_bytes(kept))
