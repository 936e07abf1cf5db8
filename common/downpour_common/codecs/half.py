"""Half precision: 2 bytes for each element."""

from __future__ import annotations

import torch

from downpour_common.codecs.base import Spoilt


class _Cast(Spoilt):
    name: str
    _dtype: torch.dtype

    def nbytes(self, numel: int) -> int:
        """See :class:`downpour_common.codecs.base.Codec`."""
        return 2 * numel

    def encode(self, flat: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`; what is too large becomes the largest number."""
        most = torch.finfo(self._dtype).max
        out.view(self._dtype).copy_(flat.clamp(-most, most))

    def decode(self, data: torch.Tensor, out: torch.Tensor, _seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        out.copy_(data.view(self._dtype))


class Half16(_Cast):
    """IEEE binary16: 11 significant bits, up to 65504, as in Micikevicius et al., "Mixed Precision Training", 2018."""

    name = "fp16"
    _dtype = torch.float16


class Brain16(_Cast):
    """bfloat16: 8 significant bits and float32's range, as in Kalamkar et al., "A Study of BFLOAT16", 2019."""

    name = "bf16"
    _dtype = torch.bfloat16
