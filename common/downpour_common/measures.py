"""What is measured of a job, and which jobs cannot be: known before anything is started.

The noise scale compares gradients of different samples at (nearly) the same weights. Where the servers get something
else, there is nothing to compare.
"""

from __future__ import annotations

from downpour_common.compression import parse_compression
from downpour_common.config import JobSpec

FAITHFUL = frozenset({"fp16", "bf16"})
"""Codecs of pushes that leave a gradient as it is, but for rounding."""


def unmeasured(spec: JobSpec) -> str:
    """Why the gradients' noise scale is not measured in a job, in words; "" if it is."""
    mode = spec.parsed_mode
    if mode.local:
        return f"mode {mode.name} exchanges weights, not gradients"
    if mode.name == "lbfgs":
        return "mode lbfgs takes the gradient of all data"
    if spec.settings.n_push != 1:
        return "n_push adds up gradients at different weights"
    codec = parse_compression(spec.compress).push
    if codec is not None and codec.name not in FAITHFUL:
        return f"codec {codec} distorts the gradients"
    return ""
