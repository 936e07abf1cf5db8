"""Parameters whose weights are at the servers, and gradients that have left: using them is an error that says why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from downpour_common.errors import ModelError

_DESCRIBING = {"__get__", "__set__", "numel", "nelement", "size", "dim", "ndimension", "stride", "element_size"}
_DESCRIBING |= {"is_floating_point", "is_complex", "__hash__", "__len__", "requires_grad_"}
_DESCRIBING |= {"register_hook", "register_post_accumulate_grad_hook"}


class AbsentParameter(nn.Parameter):
    """What a parameter is while its weights are not here. Its shape and dtype may be asked, its elements not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ModelError(
            f"{getattr(func, '__name__', func)} was called on a parameter whose weights are at the servers: with "
            "fetch=layers they are here only while the module that has them computes. Call that module instead of "
            "using its parameters from outside, and read weights from what downpour.save or the job writes; or train "
            "with fetch=whole"
        )


class PushedGradient(torch.Tensor):
    """What ``grad`` is between a parameter's backward and the step: the gradient itself is at the servers."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ModelError(
            "with fetch=layers gradients leave while backward runs, so nothing can be done to them afterwards: no "
            "clipping by the norm of all, no scaling, no reading. Train with fetch=whole for that, or change each "
            "gradient where it is made: parameter.register_hook(lambda g: g.clamp(-1, 1)) before downpour.prepare"
        )


def absent(parameter: nn.Parameter) -> torch.Tensor:
    """Contents of the parameter's shape and dtype on the host without memory: one element stands for all."""
    value = float("nan") if parameter.dtype.is_floating_point else 0
    return torch.full((), value, dtype=parameter.dtype).expand(parameter.shape)


def pushed(parameter: nn.Parameter) -> torch.Tensor:
    """What is to be ``parameter.grad`` once the gradient has left."""
    place: torch.Tensor = torch.Tensor._make_subclass(PushedGradient, absent(parameter))
    return place
