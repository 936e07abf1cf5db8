"""LARS: momentum SGD whose rate follows, tensor by tensor, the ratio of weights and gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from downpour_common.rules.base import PerTensor, check, norm


class LARS(PerTensor):
    """You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, algorithm 1.

    For each tensor w, with g its gradient::

        κ = η ‖w‖ / (‖g‖ + λ‖w‖ + ε)
        v ← µv + lr · κ · (g + λw)
        w ← w − v

    Where a norm of ``w`` or ``g`` is zero, κ counts as 1. Norms are those of whole tensors, so the servers keep tensors
    whole.

    ``momentum``: µ. ``weight_decay``: λ. ``trust``: η; 0 means κ = 1, plain SGD with momentum, which is usual in
    the parameter group of biases and normalisations (there with ``weight_decay=0`` as well). ``eps``: ε, 0 in the
    paper.
    """

    whole_tensors: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        eps: float = 0.0,
    ) -> None:
        check("lr", lr)
        check("momentum", momentum, high=1.0)
        check("weight_decay", weight_decay)
        check("trust", trust)
        check("eps", eps)
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(params, options)

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See :class:`PerTensor`."""
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weights, memory_format=torch.preserve_format)
        velocity, decay, rate = state["momentum_buffer"], group["weight_decay"], float(group["lr"])
        if group["trust"]:
            size, slope = norm(weights), norm(gradient)
            if size > 0 and slope > 0:
                rate *= group["trust"] * size / (slope + decay * size + group["eps"])
        velocity.mul_(group["momentum"]).add_(gradient, alpha=rate)
        if decay:
            velocity.add_(weights, alpha=rate * decay)
        weights.sub_(velocity)
