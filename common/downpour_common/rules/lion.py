"""Lion: the sign of an average of gradients, with half of Adam's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from downpour_common.rules.base import PerTensor, check, check_betas


class Lion(PerTensor):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.

    For each weight x, with g its gradient::

        c = β₁m + (1−β₁)g
        x ← x − lr · (sgn(c) + λx)
        m ← β₂m + (1−β₂)g

    It acts element by element. Every step has the size ``lr``, so ``lr`` is 3 to 10 times smaller than Adam's, and λ
    as much larger.

    ``betas``: β₁, β₂. ``weight_decay``: λ.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        check("lr", lr)
        check_betas(betas)
        check("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See :class:`PerTensor`."""
        if not state:
            state["exp_avg"] = torch.zeros_like(weights, memory_format=torch.preserve_format)
        average, (beta1, beta2), rate = state["exp_avg"], group["betas"], float(group["lr"])
        direction = average.lerp(gradient, 1 - beta1).sign_()  # the only temporary
        if group["weight_decay"]:
            weights.mul_(1 - rate * group["weight_decay"])
        weights.add_(direction, alpha=-rate)
        average.lerp_(gradient, 1 - beta2)
