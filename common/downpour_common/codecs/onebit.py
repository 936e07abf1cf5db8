"""One bit for each element: its sign."""

from __future__ import annotations

import numpy as np
import torch

from downpour_common.codecs.base import Spoilt, blocks_of, in_blocks

BLOCK = 2048


class OneBit(Spoilt):
    """Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
    Speech DNNs", Interspeech 2014, section 3.2: the sign, and what stands for each sign so that sums are kept::

        x̂ = mean of the block's x ≥ 0  where x ≥ 0,  mean of its x < 0  elsewhere

    The paper's blocks are columns of matrices; these are :data:`BLOCK` elements. The bytes: both means of each block
    as float32, then the signs, eight to a byte, the first in its highest bit.
    """

    name = "1bit"

    def nbytes(self, numel: int) -> int:
        """See :class:`downpour_common.codecs.base.Codec`."""
        return 8 * blocks_of(numel, BLOCK) + blocks_of(numel, 8)

    def encode(self, flat: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        rows, numel = in_blocks(flat, BLOCK), flat.numel()
        sizes = torch.full((len(rows),), float(BLOCK))
        if numel % BLOCK:
            sizes[-1] = numel % BLOCK
        negative = rows < 0  # never one of the zeros at the end
        below = torch.count_nonzero(negative, 1).float()
        parts = rows / BLOCK  # whose sums do not overflow
        at = 8 * len(rows)
        means = out[:at].view(torch.float32).view(-1, 2)
        means[:, 0] = parts.clamp(max=0.0).sum(1) * (BLOCK / below.clamp(min=1.0))
        means[:, 1] = parts.clamp(min=0.0).sum(1) * (BLOCK / (sizes - below).clamp(min=1.0))
        out[at:] = torch.from_numpy(np.packbits(~negative.view(-1)[:numel].numpy()))

    def decode(self, data: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        numel = out.numel()
        rows = blocks_of(numel, BLOCK)
        means = data[: 8 * rows].view(torch.float32).view(-1, 2)
        out.copy_(torch.from_numpy(np.unpackbits(data[8 * rows :].numpy(), count=numel)))
        whole = numel // BLOCK
        inner, rest, spans = out[: whole * BLOCK].view(-1, BLOCK), out[whole * BLOCK :], means[:, 1] - means[:, 0]
        inner.mul_(spans[:whole, None]).add_(means[:whole, :1])
        if whole < rows:
            rest.mul_(spans[-1]).add_(means[-1, 0])
