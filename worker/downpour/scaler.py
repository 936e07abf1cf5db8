"""Loss scaling for fp16: steps that a ``torch.amp.GradScaler`` skips, on all ranks of a replica or on none.

A scaler skips a step whose gradients hold Inf or NaN, and lowers its scale (Micikevicius et al. 2018). The optimizer
that :func:`downpour.prepare` has adopted hears of it (:func:`take`), and makes the step a contribution without
samples, so that the servers' rounds stay in step with the batches. In a replica of several ranks each scaler would
look at one rank's gradients only; :func:`agreeing` has them judge together.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch

from downpour.clipping import Reducer
from downpour.space import local


@contextlib.contextmanager
def agreeing(group: Reducer) -> Iterator[None]:
    """Meanwhile what a ``torch.amp.GradScaler`` of this process finds is what it finds on any rank of ``group``.

    So all ranks skip the same steps and have the same scale, if all use a scaler in the same steps.
    """
    scaler = torch.amp.GradScaler
    before, check_before = scaler._unscale_grads_, scaler._check_scale_growth_tracker

    def check(self: torch.amp.GradScaler, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if self._scale is None:  # the loss was scaled on another rank, that of a pipeline's last stage
            self._lazy_init_scale_growth_tracker(group.device)
        return check_before(self, name)

    def unscale(
        _scaler: torch.amp.GradScaler,
        optimizer: torch.optim.Optimizer,
        inverse: torch.Tensor,
        found: torch.Tensor,
        _allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        together = found.to(group.device)
        _multiply(optimizer, inverse, together)
        group.reduce(together, "max")
        return {together.device: together}

    scaler._unscale_grads_ = unscale  # type: ignore[assignment]
    scaler._check_scale_growth_tracker = check  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        scaler._unscale_grads_ = before  # type: ignore[method-assign]
        scaler._check_scale_growth_tracker = check_before  # type: ignore[method-assign]


def take(optimizer: torch.optim.Optimizer) -> bool:
    """In ``optimizer.step``: unscale its gradients if a scaler has left that to it; whether the step is to be skipped.

    A scaler tells by two attributes, as it tells torch's fused optimizers.
    """
    found: torch.Tensor | None = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    skipped = bool(found)
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None and not skipped:
        _multiply(optimizer, scale.double().reciprocal().float(), torch.zeros_like(found))
    optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]  # a local step would look at them
    return skipped


@torch.no_grad()
def _multiply(optimizer: torch.optim.Optimizer, factor: torch.Tensor, found: torch.Tensor) -> None:
    """Multiply all gradients by ``factor``, in place; ``found`` becomes 1 if one of them is not finite."""
    alike: defaultdict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                alike[gradient.device, gradient.dtype].append(gradient)
    for (device, _), gradients in alike.items():
        there = found.to(device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, there, factor.to(device))
        if there is not found:
            found.copy_(torch.maximum(found, there.to(found.device)))
