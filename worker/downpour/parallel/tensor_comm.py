"""What tensor parallel modules say to each other, with gradients: Megatron's conjugate operators, gather and slice.

Values are *whole* (the same on all ranks), *split* along a dimension, or *terms* of a sum. A module that takes a whole
value and computes with its own part of the weights begins with :func:`enter`, because each rank has only a term of the
gradient; a module that ends with terms closes with :func:`add_up`.
Paper: Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism (2019).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from downpour.spans import span

Span = tuple[int, int]


class Peers:
    """The ranks that a module is split over, as one of them sees them. A copied module has the same peers."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group: dist.ProcessGroup = mesh.get_group()
        self.rank: int = mesh.get_local_rank()
        self.width: int = mesh.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self

    def spans(self, size: int, unit: int = 1) -> tuple[Span, ...]:
        """``size`` elements cut into each rank's, in multiples of ``unit``, the first ranks having one unit more."""
        each, more = divmod(size // unit, self.width)
        edges = [unit * (rank * each + min(rank, more)) for rank in range(self.width + 1)]
        return tuple(itertools.pairwise(edges))


def enter(peers: Peers, whole: torch.Tensor) -> torch.Tensor:
    """``whole`` itself; its gradient is the sum of the ranks' gradients."""
    return _Enter.apply(peers, whole)  # type: ignore[no-any-return, no-untyped-call]


def enter_with_token(peers: Peers, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`enter`, and a zero: whoever uses it makes the backward take place even where ``whole`` is not used."""
    return _EnterWithToken.apply(peers, whole)  # type: ignore[no-any-return, no-untyped-call]


def add_up(peers: Peers, term: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' terms, whole; its gradient is the gradient of each term."""
    return _AddUp.apply(peers, term)  # type: ignore[no-any-return, no-untyped-call]


def gather(peers: Peers, part: torch.Tensor, dim: int, spans: tuple[Span, ...]) -> torch.Tensor:
    """The ranks' parts along ``dim`` put together; each rank's gradient is its slice."""
    return _Gather.apply(peers, part, dim, spans)  # type: ignore[no-any-return, no-untyped-call]


def take(peers: Peers, whole: torch.Tensor, dim: int, spans: tuple[Span, ...]) -> torch.Tensor:
    """This rank's slice of ``whole``; the gradients of all slices are put together."""
    return _Take.apply(peers, whole, dim, spans)  # type: ignore[no-any-return, no-untyped-call]


def _reduced(peers: Peers, term: torch.Tensor) -> torch.Tensor:
    total = term.clone(memory_format=torch.contiguous_format)
    with span("exchange", bytes=2 * total.nbytes):
        dist.all_reduce(total, group=peers.group)
    return total


def _joined(peers: Peers, part: torch.Tensor, dim: int, spans: tuple[Span, ...]) -> torch.Tensor:
    """All parts along ``dim``; shorter ones travel padded, since gloo gathers equal shapes only."""
    longest = max(stop - start for start, stop in spans)
    sent = part.contiguous()
    if part.shape[dim] < longest:
        shape = list(part.shape)
        shape[dim] = longest
        sent = part.new_zeros(shape)
        sent.narrow(dim, 0, part.shape[dim]).copy_(part)
    received = [torch.empty_like(sent) for _ in spans]
    with span("exchange", bytes=len(spans) * sent.nbytes):
        dist.all_gather(received, sent, group=peers.group)
    return torch.cat([r.narrow(dim, 0, b - a) for r, (a, b) in zip(received, spans, strict=True)], dim)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, whole: torch.Tensor) -> torch.Tensor:
        ctx.peers = peers
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, _reduced(ctx.peers, gradient)


class _EnterWithToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, whole: torch.Tensor) -> Any:
        ctx.peers = peers
        return whole.view_as(whole), torch.zeros((), device=whole.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _token: torch.Tensor) -> Any:
        return None, _reduced(ctx.peers, gradient)


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, peers: Peers, term: torch.Tensor) -> torch.Tensor:
        return _reduced(peers, term)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> Any:
        return None, gradient


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, part: torch.Tensor, dim: int, spans: tuple[Span, ...]) -> torch.Tensor:
        ctx.dim, ctx.mine = dim, spans[peers.rank]
        return _joined(peers, part, dim, spans)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        start, stop = ctx.mine
        return None, gradient.narrow(ctx.dim, start, stop - start), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, whole: torch.Tensor, dim: int, spans: tuple[Span, ...]) -> torch.Tensor:
        ctx.peers, ctx.dim, ctx.spans = peers, dim, spans
        start, stop = spans[peers.rank]
        return whole.narrow(dim, start, stop - start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, _joined(ctx.peers, gradient, ctx.dim, ctx.spans), None, None
