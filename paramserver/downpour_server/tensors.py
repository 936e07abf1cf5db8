"""Raw bytes ↔ flat torch tensors, without copying; and the arithmetic that rounds need."""

from __future__ import annotations

import math

import torch

from downpour_common.messages import Buffer

_HALF = frozenset({torch.float16, torch.bfloat16})


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def from_bytes(data: Buffer, dtype: str) -> torch.Tensor:
    """A flat tensor over ``data``, which must be writable unless it is ``bytes`` (then it is copied)."""
    view = memoryview(data)
    if view.readonly:
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=torch_dtype(dtype))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat contiguous CPU tensor."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. One pass in the usual case: a finite sum has only finite terms."""
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    elif not tensor.dtype.is_floating_point:
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


class Scratch:
    """Memory that is used again and again. What :meth:`take` gives is good until the same is taken next."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, use: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor with anything in it. Different ``use`` never share memory."""
        held = self._held.get((use, dtype))
        if held is None or held.numel() < numel:
            held = self._held[use, dtype] = torch.empty(numel, dtype=dtype)
        return held[:numel]


def weighted_mean(tensors: list[torch.Tensor], weights: list[int], scratch: Scratch) -> torch.Tensor:
    """Σ wᵢ·tᵢ / Σ wᵢ in the order given (half precisions are summed in float32); the tensors stay as they are.

    A single tensor is returned as it is, bit for bit; a mean lies in ``scratch`` until the next one. Weights that are
    all zero count equally.
    """
    first, *others = tensors
    if not others:
        return first
    total = sum(weights)
    shares = [w / total for w in weights] if total else [1 / len(tensors)] * len(tensors)
    numel, half = first.numel(), first.dtype in _HALF
    wide = torch.float32 if half else first.dtype
    mean = scratch.take("mean", numel, wide)
    torch.mul(scratch.take("term", numel, wide).copy_(first) if half else first, shares[0], out=mean)
    for tensor, share in zip(others, shares[1:], strict=True):
        mean.add_(scratch.take("term", numel, wide).copy_(tensor) if half else tensor, alpha=share)
    return scratch.take("rounded", numel, first.dtype).copy_(mean) if half else mean
