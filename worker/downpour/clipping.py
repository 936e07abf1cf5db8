"""Gradient clipping by the global norm, where a replica's gradients lie on several ranks (Pascanu et al. 2013).

Each rank adds up what it owns, so that a tensor that several ranks hold counts once; then all scale all they hold by
the same factor. Scripts call :func:`clip_grad_norm_`; ``torch.nn.utils.clip_grad_norm_`` gives the same, because in
such a replica it would silently clip by the norm of one rank's part (:func:`across`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grad

from downpour.space import local
from downpour_common.errors import ConfigError, ModelError


class Reducer(Protocol):
    """See :class:`downpour.parallel.group.Group`."""

    device: torch.device

    def reduce(self, values: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """``values`` of all ranks, added up or their ``max``, in place."""


@torch.no_grad()
def total_norm(
    owned: Iterable[torch.Tensor], group: Reducer, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """The norm of all gradients of a replica as one vector: fp32, a scalar, the same on all ranks.

    ``owned``: the gradients that count on this rank, ``DTensor`` or not; perhaps none. All ranks call it. Raises
    :class:`ConfigError` for a ``norm_type`` that is not positive, and ``RuntimeError``, on all ranks, for a norm that
    is to be finite and is not.
    """
    if not norm_type > 0:
        raise ConfigError(f"norm_type {norm_type:g}: across ranks it must be more than 0; inf is the largest element")
    norms = [torch.linalg.vector_norm(local(g), norm_type).double().to(group.device) for g in owned]
    found = torch.stack([torch.zeros((), dtype=torch.float64, device=group.device), *norms])
    if math.isinf(norm_type):
        norm = group.reduce(found.nan_to_num(nan=math.inf, posinf=math.inf).max(), "max").float()
    else:
        norm = group.reduce(found.pow(norm_type).sum()).pow(1 / norm_type).float()
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type:g} of the gradients is not finite, so they cannot be clipped; lower the "
            "learning rate, or let it pass with error_if_nonfinite=False"
        )
    return norm


@torch.no_grad()
def clip(
    owned: Iterable[torch.Tensor],
    every: Iterable[torch.Tensor],
    group: Reducer,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale ``every`` gradient of this rank, in place, so that the norm of all that the ranks own is ``max_norm`` at
    most; that norm as it was. Raises as :func:`total_norm`."""
    norm = total_norm(owned, group, norm_type, error_if_nonfinite)
    _scale(every, max_norm, norm)
    return norm


def _scale(gradients: Iterable[torch.Tensor], max_norm: float, norm: torch.Tensor) -> None:
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        own = local(gradient)
        own.mul_(factor.to(own.device))


class OverRanks:
    """The gradients of a replica of several ranks, as this rank holds them.

    ``parameters``: all trainable ones that it holds; ``owned``: those of them that count here. ``settle`` is called on
    all ranks before a norm is taken, and completes gradients that are sums over several ranks (tied weights).
    """

    def __init__(
        self,
        group: Reducer,
        parameters: Iterable[torch.Tensor],
        owned: Iterable[torch.Tensor],
        settle: Callable[[], object] | None = None,
    ) -> None:
        self._group = group
        self._parameters = tuple(parameters)
        self._owned = {id(p) for p in owned}
        self._settle = settle

    def known(self, gradients: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """Of ``gradients`` those that count here, and how many of them are of this replica at all."""
        counts = {id(p.grad): id(p) in self._owned for p in self._parameters if p.grad is not None}
        among = [g for g in gradients if id(g) in counts]
        return [g for g in among if counts[id(g)]], len(among)

    def norm(self, gradients: list[torch.Tensor], norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        """:func:`total_norm` of ``gradients`` and those that the other ranks give. Raises :class:`ModelError`."""
        owned, known = self.known(gradients)
        if known < len(gradients):
            raise ModelError(
                f"{len(gradients) - known} of {len(gradients)} tensors are not gradients of the prepared model; in a "
                "replica of several ranks clip its gradients apart from others"
            )
        if self._settle is not None:
            self._settle()
        return total_norm(owned, self._group, norm_type, error_if_nonfinite)


def clip_grad_norm_(
    parameters: nn.Module | torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Clip gradients by their norm, as ``torch.nn.utils.clip_grad_norm_``; returns the norm before.

    ``parameters`` may be the model itself. In a replica of several ranks the norm is that of the gradients of all of
    them; all ranks must call it, each with its parameters. Elsewhere it is torch's function.
    """
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    listed = [given] if isinstance(given, torch.Tensor) else list(given)
    return clip_grad.clip_grad_norm_(listed, max_norm, norm_type, error_if_nonfinite)


@contextlib.contextmanager
def across(replica: OverRanks) -> Iterator[None]:
    """Meanwhile norms that torch's and our functions compute of the replica's gradients are those over all its ranks.

    torch's clip_grad_norm_ looks its two halves up in its module, so that also a function imported before obeys. In the
    replica every call with an empty list counts as one of its gradients, since a rank may hold none of what is clipped.
    """
    own_norm, own_scaling = clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_

    def norm_of(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if given and not replica.known(given)[1]:
            return own_norm(given, norm_type, error_if_nonfinite, foreach)
        return replica.norm(given, float(norm_type), error_if_nonfinite)

    @torch.no_grad()
    def scale(parameters: Any, max_norm: float, norm: torch.Tensor, foreach: bool | None = None) -> None:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        gradients = [p.grad for p in given if p.grad is not None]
        if not replica.known(gradients)[1]:
            own_scaling(given, max_norm, norm, foreach)
        else:
            _scale(gradients, float(max_norm), norm)

    places = [(clip_grad, "_get_total_norm", norm_of), (clip_grad, "_clip_grads_with_norm_", scale)]
    places += [(nn.utils, "get_total_norm", norm_of), (nn.utils, "clip_grads_with_norm_", scale)]
    before = [(where, name, getattr(where, name)) for where, name, _ in places]
    try:
        for where, name, function in places:
            setattr(where, name, function)
        yield
    finally:
        for where, name, function in before:
            setattr(where, name, function)
