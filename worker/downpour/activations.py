"""Activation checkpointing by a setting: blocks that a model repeats forget what they computed, and compute it again
for backward (Chen et al. 2016). What is kept of a block is its input; the price is about one more forward.

Gradients do not change: random numbers are drawn as before, and buffers (the statistics of BatchNorm) are not changed
a second time. Blocks stay the same objects under the same names; only their class is replaced by a subclass of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model repeats, by name: modules made of others, of which an ``nn.ModuleList`` or
    ``nn.Sequential`` holds two or more of one type, such as the layers of ``nn.TransformerEncoder``. Of blocks within
    blocks the outer ones."""
    found: dict[str, nn.Module] = {}
    _collect(model, "", found, set())
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    repeats = isinstance(module, (nn.ModuleList, nn.Sequential))
    kinds = Counter(type(child) for child in module.children()) if repeats else Counter()
    for name, child in module.named_children():
        if id(child) in seen:
            continue
        seen.add(id(child))
        of_others = next(child.children(), None) is not None and next(child.parameters(), None) is not None
        if kinds[type(child)] > 1 and of_others:
            found[prefix + name] = child
        else:
            _collect(child, f"{prefix}{name}.", found, seen)


def recompute(block: nn.Module) -> None:
    """From now on ``block`` keeps only its input for backward, and computes the rest again.

    To be called once a model has been split, since what looks for classes would find another one.
    """
    original = type(block)

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return original.forward(self, *inputs, **named)
        contexts = lambda: (contextlib.nullcontext(), _buffers_apart(self))  # noqa: E731
        return checkpoint(original.forward, self, *inputs, use_reentrant=False, context_fn=contexts, **named)

    names = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
    block.__class__ = type(original.__name__, (original,), names)


@contextlib.contextmanager
def _buffers_apart(block: nn.Module) -> Iterator[None]:
    """Meanwhile ``block`` computes on copies of its buffers; the buffers stay as they are."""
    kept = [(module, dict(module._buffers)) for module in block.modules() if module._buffers]
    try:
        for module, buffers in kept:
            module._buffers.update({n: b if b is None else b.clone() for n, b in buffers.items()})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
