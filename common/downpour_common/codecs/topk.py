"""The largest elements alone."""

from __future__ import annotations

import math

import torch

from downpour_common.errors import ProtocolError


class TopK:
    """The ``fraction`` of the elements that is largest in magnitude: Aji and Heafield, "Sparse Communication for
    Distributed Gradient Descent", EMNLP 2017; what is left waits, as in Lin et al., "Deep Gradient Compression", ICLR
    2018. There the fraction is of the whole gradient; here of each chunk, so that sizes are known::

        k = ⌈f n⌉        x̂ᵢ = xᵢ  for the k largest |xᵢ|,  0 elsewhere

    The bytes: ``k`` places as int32, ascending, then their values as float32.
    """

    name = "topk"

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def nbytes(self, numel: int) -> int:
        """See :class:`downpour_common.codecs.base.Codec`."""
        return 8 * math.ceil(self._fraction * numel)

    def encode(self, flat: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        half = out.numel() // 2
        places = torch.topk(flat.abs(), half // 4, sorted=False).indices.sort().values
        out[:half].view(torch.int32).copy_(places)
        torch.index_select(flat, 0, places, out=out[half:].view(torch.float32))

    def decode(self, data: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        half = data.numel() // 2
        places = data[:half].view(torch.int32)
        if half and not 0 <= int(places.min()) <= int(places.max()) < out.numel():
            raise ProtocolError(f"a place outside of the chunk's {out.numel()} elements")
        out.zero_()
        out.index_copy_(0, places.long(), data[half:].view(torch.float32))

    def spoil(self, out: torch.Tensor) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        half = out.numel() // 2
        out[:half].zero_()
        out[half:].fill_(255)
