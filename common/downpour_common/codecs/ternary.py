"""Two bits for each element: plus, minus, or nothing."""

from __future__ import annotations

import numpy as np
import torch

from downpour_common.codecs.base import Spoilt, blocks_of, in_blocks

BLOCK = 1024
THRESHOLD = 0.7
"""Of a block's mean magnitude. Near the best for what is distributed normally or uniformly (Li et al. 2016, eq. 6)."""
_LEVELS = np.array([0.0, 1.0, -1.0, 0.0], dtype=np.float32)
_BYTES = np.stack([_LEVELS[(np.arange(256) >> shift) & 3] for shift in (0, 2, 4, 6)], axis=1)
"""By byte: the four levels in it."""


class Ternary(Spoilt):
    """Three levels by a threshold, with what is left kept for later, as the 2-bit compression of MXNet does (Strom,
    "Scalable Distributed DNN Training Using Commodity GPU Cloud Computing", Interspeech 2015). Levels are those of
    Wen et al., "TernGrad", NeurIPS 2017, but chosen, not drawn, with the threshold and scale of Li et al., "Ternary
    Weight Networks", 2016, for each block of :data:`BLOCK` elements::

        t = 0.7 mean |x|        s = mean of the |x| > t        x̂ = s sgn(x)  where |x| > t,  0 elsewhere

    The bytes: scales as float32, then four elements to a byte, the first in its lowest bits: 0, 1 for s, 2 for -s.
    """

    name = "2bit"

    def nbytes(self, numel: int) -> int:
        """See :class:`downpour_common.codecs.base.Codec`."""
        return 4 * blocks_of(numel, BLOCK) + blocks_of(numel, 4)

    def encode(self, flat: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        rows, numel = in_blocks(flat, BLOCK), flat.numel()
        sizes = torch.full((len(rows), 1), float(BLOCK))
        if numel % BLOCK:
            sizes[-1] = numel % BLOCK
        parts = (rows / BLOCK).abs_()  # whose sums do not overflow
        large = parts > parts.sum(1, keepdim=True).mul_(THRESHOLD) / sizes
        parts.mul_(large)
        at = 4 * len(rows)
        scales = parts.sum(1) * (BLOCK / torch.count_nonzero(large, 1).clamp(min=1))
        out[:at].view(torch.float32).copy_(scales)
        codes = large.to(torch.uint8) << (rows < 0).to(torch.uint8)
        fours = codes.view(-1).view(torch.int32)[: blocks_of(numel, 4)]  # the first of them in the lowest bits
        out[at:] = (fours | fours >> 6 | fours >> 12 | fours >> 18).to(torch.uint8)

    def decode(self, data: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        numel = out.numel()
        rows = blocks_of(numel, BLOCK)
        scales = data[: 4 * rows].view(torch.float32)
        levels = torch.from_numpy(np.take(_BYTES, data[4 * rows :].numpy(), axis=0)).view(-1)
        whole = numel // BLOCK
        inner = whole * BLOCK
        torch.mul(levels[:inner].view(-1, BLOCK), scales[:whole, None], out=out[:inner].view(-1, BLOCK))
        if whole < rows:
            torch.mul(levels[inner:numel], scales[-1], out=out[inner:])
