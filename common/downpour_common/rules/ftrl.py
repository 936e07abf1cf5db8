"""FTRL-Proximal: online learning with a rate per coordinate, whose l1 makes weights exactly zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from downpour_common.rules.base import PerTensor, check


class FTRL(PerTensor):
    """McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013, algorithm 1.

    For each weight w, with g its gradient, α = ``lr``, β = ``beta``, n the sum of squared gradients::

        1/η(n) = (β + √n) / α
        z ← z + g − (1/η(n + g²) − 1/η(n)) w        n ← n + g²
        w ← 0                                       where |z| ≤ l1
        w ← −(z − sgn(z) l1) / (1/η(n) + l2)        elsewhere

    It acts element by element. Two things go beyond the paper, and change nothing in its setting: z begins so that
    the first weights, which the paper has at zero, are the solution for n = 0, and a change of ``lr`` is one of η (the
    rate of the last step is part of the state), so that schedules move the rate and not the weights. At ``lr`` 0
    nothing happens. ``lr`` is the largest rate times β, as no rate is above α/β.

    ``initial``: n at the start.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        initial: float = 0.0,
    ) -> None:
        check("lr", lr)
        check("beta", beta)
        check("l1", l1)
        check("l2", l2)
        check("initial", initial)
        super().__init__(params, {"lr": lr, "beta": beta, "l1": l1, "l2": l2, "initial": initial})

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See :class:`PerTensor`."""
        rate, beta, l1, l2 = float(group["lr"]), group["beta"], group["l1"], group["l2"]
        if not rate:
            return
        if not state:
            state["n"] = torch.full_like(weights, group["initial"], memory_format=torch.preserve_format)
            state["z"] = weights * -((beta + group["initial"] ** 0.5) / rate + l2)
            if l1:
                state["z"].sub_(weights.sign(), alpha=l1)
            state["last_lr"] = torch.tensor(rate, dtype=torch.float64)
        n, z, last = state["n"], state["z"], float(state["last_lr"])
        strength = n.sqrt().add_(beta).div_(last)  # 1/η, of the last step
        n.addcmul_(gradient, gradient)
        z.add_(gradient).addcmul_(strength, weights)
        torch.sqrt(n, out=strength).add_(beta).div_(rate)
        z.addcmul_(strength, weights, value=-1)
        strength.add_(l2)
        weights.copy_(torch.nn.functional.softshrink(z, l1) if l1 else z)
        weights.div_(strength).neg_()
        if rate != last:
            state["last_lr"].fill_(rate)
