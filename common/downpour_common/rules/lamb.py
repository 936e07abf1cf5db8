"""LAMB: Adam's direction, scaled tensor by tensor to the size of the weights."""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from downpour_common.rules.base import PerTensor, check, check_betas, count_step, norm


class LAMB(PerTensor):
    """You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, algorithm 2.

    For each tensor x, with g its gradient at step t::

        m ← β₁m + (1−β₁)g              v ← β₂v + (1−β₂)g²
        r = m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε)
        x ← x − lr · ‖x‖/‖r + λx‖ · (r + λx)

    φ of the paper is the identity. Where a norm is zero the ratio counts as 1. Norms are those of whole tensors, so the
    servers keep tensors whole. The paper leaves biases and normalisations out of the decay: give them a group of their
    own with ``weight_decay=0``.

    ``lr``: at large batches it grows with the batch's square root. ``betas``: β₁, β₂. ``weight_decay``: λ.
    ``bias_correction``: the divisions by 1−βᵗ; the paper's appendix replaces them by a warm-up of ``lr``.
    """

    whole_tensors: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
    ) -> None:
        check("lr", lr)
        check_betas(betas)
        check("eps", eps)
        check("weight_decay", weight_decay)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "bias_correction": bias_correction})

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See :class:`PerTensor`."""
        if not state:
            state["exp_avg"] = torch.zeros_like(weights, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weights, memory_format=torch.preserve_format)
        step, (beta1, beta2) = count_step(state), group["betas"]
        average, square = state["exp_avg"], state["exp_avg_sq"]
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        direction = square.sqrt().div_(sqrt(second)).add_(group["eps"])  # the only temporary
        torch.div(average, direction, out=direction).div_(first)
        if group["weight_decay"]:
            direction.add_(weights, alpha=group["weight_decay"])
        size, length = norm(weights), norm(direction)
        ratio = size / length if size > 0 and length > 0 else 1.0
        weights.add_(direction, alpha=-float(group["lr"]) * ratio)
