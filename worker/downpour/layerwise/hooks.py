"""Where a model's forward and backward need their weights, and where gradients are complete.

Forward: hooks of the modules. Backward: saved-tensor hooks, so that it asks for exactly the weights that it uses, when
it uses them: of what lies in a layer's memory the graph keeps the place instead of the tensor. Other tensors go to
whatever hooks were in force around (activation checkpointing, offloading), or are kept as autograd would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from downpour.layerwise.space import Block, LayerSpace


class Watcher(Protocol):
    """See :class:`downpour.layerwise.engine.LayerwiseEngine`."""

    def enter(self, blocks: tuple[Block, ...], phase: str) -> None:
        """Before a module computes."""

    def leave(self, blocks: tuple[Block, ...]) -> None:
        """After it has."""

    def need(self, block: Block, phase: str) -> None:
        """Before backward computes with the block's weights."""

    def before_gradient(self, parameter: nn.Parameter) -> None:
        """Before a gradient is added to ``parameter.grad``."""

    def gradient_made(self, parameter: nn.Parameter) -> None:
        """After it has been."""


def watch(watcher: Watcher, space: LayerSpace) -> None:
    """Tell ``watcher`` what the model of ``space`` does."""
    forwards = _Forwards(watcher, space)
    for unit, blocks in space.used_by.items():
        unit.register_forward_pre_hook(forwards.before(blocks), prepend=True)
        unit.register_forward_hook(forwards.after(blocks), always_call=True)
    for parameter, (block, _) in space.place.items():
        if block.kind == "trainable":
            parameter.register_hook(_checking(watcher, parameter))
            parameter.register_post_accumulate_grad_hook(watcher.gradient_made)


def _checking(watcher: Watcher, parameter: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def check(_gradient: torch.Tensor) -> None:
        watcher.before_gradient(parameter)

    return check


class _Forwards:
    """The forwards under way, outermost first."""

    def __init__(self, watcher: Watcher, space: LayerSpace) -> None:
        self._watcher = watcher
        self._space = space
        self._open: list[tuple[nn.Module, saved_tensors_hooks]] = []

    def before(self, blocks: tuple[Block, ...]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _args: Any) -> None:
            self._watcher.enter(blocks, _phase())
            saving = self._saving()
            saving.__enter__()
            self._open.append((module, saving))

        return hook

    def after(self, blocks: tuple[Block, ...]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, _result: Any) -> None:
            if self._open and self._open[-1][0] is module:  # not if it could not begin
                self._open.pop()[1].__exit__()
                self._watcher.leave(blocks)

        return hook

    def _saving(self) -> saved_tensors_hooks:
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(tensor: torch.Tensor) -> Any:
            found = self._space.found(tensor)
            if found is not None:
                return _Weights(*found, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)
            if around is not None:
                return around[0](tensor)
            kept = tensor.detach()  # of an output itself the graph would hold itself
            return _Kept(kept, kept._version)

        def unpack(packed: Any) -> Any:
            if isinstance(packed, _Weights):
                self._watcher.need(packed.block, "backward")
                return packed.of(self._space.weights[packed.segment])
            return packed.tensor() if isinstance(packed, _Kept) else around[1](packed)

        return saved_tensors_hooks(pack, unpack)


def _phase() -> str:
    if torch._C._current_graph_task_id() != -1:
        return "again"
    return "forward" if torch.is_grad_enabled() else "evaluation"


class _Weights:
    """A place in the memory of a block's weights."""

    __slots__ = ("_dtype", "_offset", "_shape", "_stride", "block", "segment")

    def __init__(
        self,
        block: Block,
        segment: int,
        shape: torch.Size,
        stride: tuple[int, ...],
        offset: int,
        dtype: torch.dtype,
    ) -> None:
        self.block = block
        self.segment = segment
        self._shape, self._stride, self._offset, self._dtype = shape, stride, offset, dtype

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """What is there now."""
        return flat.view(self._dtype).as_strided(self._shape, self._stride, self._offset)


class _Kept:
    """A tensor as autograd itself keeps it."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, version: int) -> None:
        self._tensor = tensor
        self._version = version

    def tensor(self) -> torch.Tensor:
        """Raises ``RuntimeError``, as autograd, if it has been changed since."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(self._tensor.shape)} is at version {self._tensor._version}; expected version {self._version} "
                "instead"
            )
        return self._tensor
