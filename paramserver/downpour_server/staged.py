"""Payloads of push-pulls that may follow: what workers send while they still compute. Nothing of it is applied yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from downpour_common import messages as m
from downpour_common import wire
from downpour_server.tensors import from_bytes, is_finite


@dataclass(frozen=True, slots=True)
class Held:
    """A payload as it came. ``stage`` is the number of the :class:`m.Stage` that brought it."""

    worker_epoch: int
    stage: int
    gradient: torch.Tensor
    digest: bytes
    finite: bool


class StagedPayloads:
    """The newest payload of each slot and chunk. One of each at most, so memory is bounded as that of a round."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, stage: m.Stage, dtype: str) -> bytes:
        """Keep the payload, in place of an older one; returns its digest."""
        gradient, digest = from_bytes(stage.payload, dtype), wire.digest(stage.payload)
        finite = is_finite(gradient)
        self._held[stage.slot, stage.chunk] = Held(stage.worker_epoch, stage.request, gradient, digest, finite)
        return digest

    def take(self, push: m.PushPullStaged) -> Held | None:
        """Exactly the payload that ``push`` means, or None; in either case none is held for its slot and chunk then."""
        held = self.look(push)
        self._held.pop((push.slot, push.chunk), None)
        return held

    def look(self, push: m.PushPullStaged) -> Held | None:
        """As :meth:`take`, and it stays."""
        held = self._held.get((push.slot, push.chunk))
        if held is None or (held.worker_epoch, held.stage) != (push.worker_epoch, push.stage):
            return None
        return held if push.digest in (b"", held.digest) else None

    def drop(self, slot: int, chunk: int | None = None) -> None:
        """Forget what is held of this slot: for one chunk, or all of it."""
        if chunk is not None:
            self._held.pop((slot, chunk), None)
        elif self._held:
            self._held = {key: held for key, held in self._held.items() if key[0] != slot}
