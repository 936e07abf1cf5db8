"""Make the first optimizer of a process without loading torch's compiler.

``torch.optim.Optimizer`` marks some methods as not to be compiled, and loads all of ``torch._dynamo`` (1 to 2
seconds) to do so at their first call, whether anything is ever compiled or not. Here the mark is made as soon as
something else has loaded the compiler, and not before. A torch whose internals look different is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_MARK = "__dynamo_disable"


def defer_compiler() -> None:
    """Do it for this process; imports torch."""
    from torch.optim import Optimizer

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        inner = getattr(getattr(Optimizer, name, None), "__wrapped__", None)
        if inner is not None and not hasattr(inner, _MARK):
            setattr(inner, _MARK, _unless_compiling(inner))


def _unless_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        disable = getattr(dynamo, "disable", None)  # missing while the module is still being loaded
        if disable is None:
            return function(*args, **kwargs)
        setattr(function, _MARK, disable(function))
        return getattr(function, _MARK)(*args, **kwargs)

    return call
