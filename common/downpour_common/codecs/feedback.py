"""Error feedback: what a codec loses is added to what is encoded next, so that nothing is lost for good.

Seide et al. 2014; that SGD converges with it, as fast as without a codec, is shown by Karimireddy et al., "Error
Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019, algorithm 2::

    p = g + e        sent: C(p)        e = p - C(p)
"""

from __future__ import annotations

import torch

from downpour_common.codecs.base import Codec


def seed_of(chunk: int, number: int) -> int:
    """The seed of what is encoded of a chunk under a number that counts up."""
    return ((chunk & 0x7FFFFF) << 40) | (number & 0xFFFFFFFFFF)


def encode_with_feedback(
    codec: Codec, flat: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, seed: int
) -> None:
    """Encode ``flat`` (float32) and what is left of before, ``residual``, which becomes what is left now.

    If their sum holds NaN or Inf, what is encoded decodes as NaN, and ``residual`` stays as it is. ``scratch``:
    float32, as long, for anything.
    """
    torch.add(flat, residual, out=scratch)
    if not (torch.isfinite(scratch.sum()) or torch.isfinite(scratch).all()):
        codec.spoil(out)
        return
    codec.encode(scratch, out, seed)
    codec.decode(out, residual, seed)
    torch.sub(scratch, residual, out=residual)
