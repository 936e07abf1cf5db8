"""Codecs: flat float32 tensors as fewer bytes, whose number follows from the number of elements alone. One file each.

So sizes are checked before anything is decoded, and memory is used again and again. All are pure functions of the
tensor and a seed, on host memory. What they lose is not lost: see :mod:`downpour_common.codecs.feedback`.

Importing this package does not import torch; making a codec does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from downpour_common.compression import CodecChoice

if TYPE_CHECKING:
    from downpour_common.codecs.base import Codec

_WHERE = {
    "fp16": ("half", "Half16"),
    "bf16": ("half", "Brain16"),
    "int8": ("int8", "Int8"),
    "1bit": ("onebit", "OneBit"),
    "2bit": ("ternary", "Ternary"),
    "topk": ("topk", "TopK"),
    "randomk": ("randomk", "RandomK"),
}
"""By name: the module and its class."""


def codec_for(choice: CodecChoice) -> Codec:
    """The codec of a job's choice."""
    module, name = _WHERE[choice.name]
    made = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    codec: Codec = made(choice.fraction) if choice.fraction else made()
    return codec
