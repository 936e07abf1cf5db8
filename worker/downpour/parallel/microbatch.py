"""Batches in parts: how they are cut, and training on the parts one after another (gradient accumulation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as trees

from downpour import spans
from downpour_common.errors import ModelError

Criterion = Callable[[Any, Any], torch.Tensor]
"""The mean loss of a batch, from the outputs and the targets."""


def batch_size(inputs: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor. Raises :class:`ModelError` if there is none."""
    for leaf in trees.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            if leaf.shape[0] == 0:
                raise ModelError("a batch without samples: its first tensor has the shape " + str(tuple(leaf.shape)))
            return leaf.shape[0]
    raise ModelError("the inputs hold no tensor with the samples along its first dimension")


def part_sizes(samples: int, count: int) -> list[int]:
    """Sizes of ``count`` parts, as equal as they can be, the larger ones first; fewer if there are fewer samples."""
    count = max(1, min(samples, count))
    return [samples // count + (part < samples % count) for part in range(count)]


def parts(value: Any, samples: int, sizes: Sequence[int]) -> list[Any]:
    """``value``, a tensor or tuples, lists and dicts of them, in parts. Tensors whose first dimension is not the
    samples', and whatever is no tensor, are in every part."""
    leaves, form = trees.tree_flatten(value)
    cut: list[Sequence[Any]] = []
    for leaf in leaves:
        whole = not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.shape[0] != samples
        cut.append([leaf] * len(sizes) if whole else leaf.split(list(sizes)))
    return [trees.tree_unflatten([leaf[part] for leaf in cut], form) for part in range(len(sizes))]


def joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The inverse of :func:`parts`, for outputs.

    Raises :class:`ModelError` for a tensor that has no dimension of samples.
    """
    if len(values) == 1:
        return values[0]
    flat = [trees.tree_flatten(value) for value in values]
    found: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(leaves[0], torch.Tensor):
            found.append(leaves[0])
            continue
        if any(leaf.dim() == 0 or leaf.shape[0] != size for leaf, size in zip(leaves, sizes, strict=True)):
            raise ModelError(
                f"the model gives a tensor of the shape {tuple(leaves[0].shape)} for {sizes[0]} samples, which cannot "
                "be put together from micro-batches: let it give the samples along the first dimension"
            )
        found.append(torch.cat(leaves))
    return trees.tree_unflatten(found, flat[0][1])


def arguments(inputs: Any) -> tuple[Any, ...]:
    """What a model is called with: a tuple's or list's elements are its arguments."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def microbatched(model: nn.Module, criterion: Criterion, inputs: Any, targets: Any, count: int) -> torch.Tensor:
    """Forward and backward of a batch in ``count`` parts; returns the mean loss, detached.

    For a criterion that is a mean over samples, gradients are those of the whole batch up to rounding; activations are
    those of one part only. What a model computes over the samples of a batch (batch norm), it computes over a part.
    """
    samples = batch_size(inputs)
    sizes = part_sizes(samples, count)
    total: torch.Tensor | None = None
    pairs = zip(parts(inputs, samples, sizes), parts(targets, samples, sizes), strict=True)
    for number, (given, wanted) in enumerate(pairs):
        with spans.span("forward", stage=0, microbatch=number):
            loss = criterion(model(*arguments(given)), wanted)
            if len(sizes) > 1:
                loss = loss * (sizes[number] / samples)
        with spans.span("backward", stage=0, microbatch=number):
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total
