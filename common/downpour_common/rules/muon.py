"""Muon for matrices and AdamW for everything else, in one optimizer, because a job has one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from downpour_common.rules.base import PerTensor, check, check_betas, count_step

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7


class MuonAdamW(PerTensor):
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; with AdamW (Loshchilov and
    Hutter, 2019) for the tensors that Muon is not for.

    For each matrix X of A×B elements, with G its gradient, as ``torch.optim.Muon`` does it::

        M ← µM + (1−µ)G                 U = (1−µ)G + µM  (nesterov), else M
        O = NewtonSchulz₅(U)            U with its singular values brought near 1, in bfloat16
        X ← (1 − lr·λ)X − lr·√max(1, A/B) · O

    and for other tensors of any shape what ``torch.optim.AdamW`` does at the rate lr · ``adamw_ratio``, so that
    schedules move both, with ``betas``, ``eps`` and the same λ. In parameter groups with ``muon=False`` matrices are
    AdamW's, too: embeddings and the last layer, says the author. O depends on the whole matrix, so the servers keep
    tensors whole.

    ``momentum``: µ. ``weight_decay``: λ. ``ns_steps``: iterations of Newton-Schulz.
    """

    whole_tensors: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        muon: bool = True,
        adamw_ratio: float = 0.015,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        check("lr", lr)
        check("weight_decay", weight_decay)
        check("momentum", momentum, high=1.0)
        check("ns_steps", ns_steps, 1, 100)
        check("adamw_ratio", adamw_ratio)
        check_betas(betas)
        check("eps", eps)
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        options |= {"ns_steps": ns_steps, "muon": muon, "adamw_ratio": adamw_ratio, "betas": betas, "eps": eps}
        super().__init__(params, options)

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See :class:`PerTensor`."""
        if group["muon"] and weights.ndim == 2:
            _muon(weights, gradient, state, group)
        else:
            _adamw(weights, gradient, state, group)


def _muon(weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
    average, momentum = state["momentum_buffer"], group["momentum"]
    average.lerp_(gradient, 1 - momentum)
    update = gradient.lerp(average, momentum) if group["nesterov"] else average
    rate, (rows, columns) = float(group["lr"]), weights.shape
    weights.mul_(1 - rate * group["weight_decay"])
    weights.add_(_orthogonal(update, group["ns_steps"]), alpha=-rate * max(1.0, rows / columns) ** 0.5)


def _orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: X ← aX + (bS + cS²)X with S = XXᵀ, on the side of the smaller dimension."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=_EPS))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _adamw(weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["exp_avg"] = torch.zeros_like(weights, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(weights, memory_format=torch.preserve_format)
    step, (beta1, beta2), rate = count_step(state), group["betas"], float(group["lr"]) * group["adamw_ratio"]
    average, square = state["exp_avg"], state["exp_avg_sq"]
    weights.mul_(1 - rate * group["weight_decay"])
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weights.addcdiv_(average, spread, value=-rate / (1 - beta1**step))
