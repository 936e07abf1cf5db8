"""Mixed precision by a setting: the model computes in 16 bits where torch finds that safe, and nothing else changes.

``torch.autocast`` casts inputs and weights of matrix products and the like; weights, gradients, what the loss sees and
what travels stay as they are (the master copies of Micikevicius et al. 2018). Installed as hooks, so that names, the
state dict, copies and pickles of the model stay what they were.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from downpour.context import Autocast

_HALVES = (torch.bfloat16, torch.float16)


class _Open(threading.local):
    """The forwards of this thread that are under way, each with its module."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, torch.autocast]] = []


_open = _Open()


def autocast_forward(module: nn.Module, device: torch.device, kind: Autocast) -> None:
    """From now on ``module(...)`` computes under ``torch.autocast`` to ``kind`` on ``device``, and what it returns is
    fp32 where it would be 16 bits wide: tensors in any structure of lists, tuples and dicts. ``off`` changes nothing.

    In a pipeline each stage's module gets it, so what travels between stages is fp32.
    """
    if kind == "off":
        return
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
    module.register_forward_pre_hook(partial(_enter, device.type, dtype), prepend=True)
    module.register_forward_hook(_leave, always_call=True)


def _enter(device: str, dtype: torch.dtype, module: nn.Module, _inputs: object) -> None:
    context = torch.autocast(device, dtype=dtype)
    context.__enter__()
    _open.stack.append((module, context))


def _leave(module: nn.Module, _inputs: object, output: Any) -> Any:
    """Also called, without an output, when the forward has raised, perhaps before it was entered."""
    if not _open.stack or _open.stack[-1][0] is not module:
        return None
    _open.stack.pop()[1].__exit__(None, None, None)
    return tree_map_only(torch.Tensor, _widened, output)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor
