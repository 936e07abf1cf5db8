"""Raw bytes ↔ flat torch tensors, without copying; and the arithmetic that rounds need."""

from __future__ import annotations

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
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return True
    if tensor.dtype in _HALF:
        return bool(torch.isfinite(tensor).all())
    total = tensor.sum()
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def weighted_mean(tensors: list[torch.Tensor], weights: list[int]) -> torch.Tensor:
    """Σ wᵢ·tᵢ / Σ wᵢ in the order given (half precisions are summed in float32); the tensors stay as they are.

    A single tensor is returned as it is, bit for bit. Weights that are all zero count equally.
    """
    if len(tensors) == 1:
        return tensors[0]
    total = sum(weights)
    shares = [w / total for w in weights] if total else [1 / len(tensors)] * len(tensors)
    dtype = tensors[0].dtype
    mean = (tensors[0].float() if dtype in _HALF else tensors[0]) * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        mean.add_(tensor.to(mean.dtype), alpha=share)
    return mean.to(dtype)
