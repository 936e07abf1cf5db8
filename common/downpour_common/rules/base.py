"""What the optimizers here have in common: one tensor at a time, in place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

HALF = frozenset({torch.float16, torch.bfloat16})


class PerTensor(Optimizer):
    """An optimizer that updates each tensor by itself.

    ``whole_tensors``: the update of an element depends on more of its tensor than the element, so that the tensor must
    not be cut.
    """

    whole_tensors: ClassVar[bool] = False

    @abstractmethod
    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change ``weights`` and ``state`` (empty at first) in place; ``gradient`` stays as it is."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all tensors that have a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                if weights.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                self.update(weights, weights.grad, self.state[weights], group)
        return loss


def check(name: str, value: float, low: float = 0.0, high: float = float("inf")) -> None:
    """Raises :class:`ValueError` unless ``low <= value < high``."""
    if not low <= value < high:
        most = "" if high == float("inf") else f", below {high:g}"
        raise ValueError(f"{name} is {low:g} or more{most} (found {value})")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises :class:`ValueError` unless both are at least 0 and below 1."""
    for index, beta in enumerate(betas):
        check(f"betas[{index}]", beta, high=1.0)


def count_step(state: dict[str, Any]) -> int:
    """Counts in ``state["step"]``, as torch's optimizers do; the number of this step, from 1."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    state["step"] += 1
    return int(state["step"])


def norm(tensor: Tensor) -> float:
    """The Euclidean norm of all elements; half precisions are summed in float32."""
    wide = torch.float32 if tensor.dtype in HALF else None
    return float(torch.linalg.vector_norm(tensor, dtype=wide))
