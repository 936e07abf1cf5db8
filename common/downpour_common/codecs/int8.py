"""Eight bits for each element, and a scale for each block."""

from __future__ import annotations

import torch

from downpour_common.codecs.base import Spoilt, blocks_of, in_blocks

BLOCK = 512
_MOST = 127.0


class Int8(Spoilt):
    """Linear quantisation by blocks, as in Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016,
    with a scale for each block of :data:`BLOCK` elements::

        s = max |x| / 127        q = round(x / s)        x̂ = s q

    The bytes: scales as float32, then ``q``. So |x̂ - x| ≤ s/2.
    """

    name = "int8"

    def nbytes(self, numel: int) -> int:
        """See :class:`downpour_common.codecs.base.Codec`."""
        return 4 * blocks_of(numel, BLOCK) + numel

    def encode(self, flat: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        rows = in_blocks(flat, BLOCK)
        scales = rows.abs().amax(1) / _MOST
        levels = (rows / torch.where(scales > 0, scales, 1.0)[:, None]).round_().clamp_(-_MOST, _MOST)
        at = 4 * len(rows)
        out[:at].view(torch.float32).copy_(scales)
        out[at:].view(torch.int8).copy_(levels.view(-1)[: flat.numel()])

    def decode(self, data: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        at, numel = 4 * blocks_of(out.numel(), BLOCK), out.numel()
        scales = data[:at].view(torch.float32)
        whole = numel // BLOCK * BLOCK
        out.copy_(data[at:].view(torch.int8))
        out[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
        if whole < numel:
            out[whole:].mul_(scales[-1])
