"""A worker's side of ``--compress``: gradients are encoded with error feedback, weights are decoded.

What a codec leaves out of a gradient is this worker's *residual* of the chunk, and goes into the next one that counts.
The encoded bytes stay where they are until the push is answered, so whatever is sent again is sent as it was.
"""

from __future__ import annotations

import torch

from downpour_common import messages as m
from downpour_common.codecs import codec_for
from downpour_common.codecs.base import Codec, as_memory, as_tensor
from downpour_common.codecs.feedback import encode_with_feedback, seed_of
from downpour_common.compression import Compression, is_coded
from downpour_common.errors import ProtocolError
from downpour_common.layout import Chunk
from downpour_common.messages import Buffer


class WorkerCoding:
    """See the module. :meth:`encode` and residuals are for the training thread, the rest for whichever receives."""

    def __init__(self, compression: Compression) -> None:
        self._push: Codec | None = None if compression.push is None else codec_for(compression.push)
        self._pull: Codec | None = None if compression.pull is None else codec_for(compression.pull)
        self._follows = compression.pull is not None and not compression.pull.whole
        self._residuals: dict[int, torch.Tensor] = {}
        self._payloads: dict[int, torch.Tensor] = {}
        self._views: dict[int, torch.Tensor] = {}
        self._held: dict[int, int] = {}
        self._scratch = torch.empty(0)

    def pushes(self, chunk: Chunk) -> bool:
        """Whether contributions to the chunk are encoded."""
        return self._push is not None and is_coded(chunk)

    def stages(self, chunk: Chunk) -> bool:
        """Whether the chunk's gradient may be sent ahead: as it is, and with nothing to say about the answer."""
        return not (self.pushes(chunk) or (self._follows and is_coded(chunk)))

    def encode(self, chunk: Chunk, gradient: memoryview, seq: int, counts: bool) -> memoryview:
        """The contribution of number ``seq``, good until the next one to the chunk. One that does not count
        (``counts``), or that holds NaN or Inf, which the shard is to find in it, leaves the residual as it was."""
        assert self._push is not None
        index, numel = chunk.index, chunk.numel
        payload = self._payloads.get(index)
        if payload is None:
            payload = self._payloads[index] = torch.empty(self._push.nbytes(numel), dtype=torch.uint8)
            self._residuals.setdefault(index, torch.zeros(numel))
        flat = torch.frombuffer(gradient, dtype=torch.float32)
        if not counts:
            payload.zero_()
        else:
            if len(self._scratch) < numel:
                self._scratch = torch.empty(numel)
            scratch, seed = self._scratch[:numel], seed_of(index, seq)
            encode_with_feedback(self._push, flat, self._residuals[index], payload, scratch, seed)
        return as_memory(payload)

    # ------------------------------------------------------------ residuals

    def residual(self, chunk: Chunk) -> memoryview:
        """A copy of what is owed to the chunk now."""
        owed = self._residuals.get(chunk.index)
        owed = torch.zeros(chunk.numel) if owed is None else owed.clone()
        return as_memory(owed.view(torch.uint8))

    def owe(self, chunk: Chunk, payload: Buffer) -> None:
        """Go on with what was owed at a checkpoint; nothing, if ``payload`` is empty."""
        size = memoryview(payload).nbytes
        if size not in (0, chunk.nbytes):
            raise ProtocolError(f"chunk {chunk.index} has {chunk.nbytes} bytes, its residual {size}")
        if size:
            self._residuals[chunk.index] = as_tensor(payload).view(torch.float32).clone()

    # ------------------------------------------------------------ weights

    def held(self, chunk: Chunk) -> int:
        """What a request for the chunk's weights says that this worker has, see :class:`m.Pull`."""
        return self._held.get(chunk.index, 0) if self._pull is not None and is_coded(chunk) else -1

    def differs(self, chunk: Chunk) -> bool:
        """Whether weights come as differences."""
        return self._follows and is_coded(chunk)

    def not_coded(self, chunk: Chunk) -> None:
        """The chunk's weights have come as they are."""
        self._held.pop(chunk.index, None)

    def take(self, message: m.WeightsCoded, chunk: Chunk, into: memoryview) -> bool:
        """Bring the weights in ``message`` to ``into``; False: it is of no use any more. Raises
        :class:`ProtocolError`."""
        if self._pull is None or not is_coded(chunk):
            raise ProtocolError(f"chunk {chunk.index} is not encoded in this job")
        index, data = chunk.index, as_tensor(message.payload)
        size = chunk.nbytes if self._follows and not message.base else self._pull.nbytes(chunk.numel)
        if len(data) != size:
            raise ProtocolError(f"chunk {index} has {size} bytes, the answer {len(data)}")
        weights = torch.frombuffer(into, dtype=torch.float32)
        if not self._follows:
            self._pull.decode(data, weights, 0)
            return True
        if not message.base:
            self._views[index] = data.view(torch.float32).clone()
        elif message.base != self._held.get(index, 0):
            return False  # a whole view, asked for later, has come before
        else:
            self._pull.decode(data, weights, seed_of(index, message.view))
            self._views[index].add_(weights)
        weights.copy_(self._views[index])
        self._held[index] = message.view
        return True
