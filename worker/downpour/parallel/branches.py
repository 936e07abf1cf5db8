"""Parallel branches, as in an Inception block, of which each rank of a replica computes some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from downpour.parallel.styles import turn
from downpour.parallel.tensor_comm import Peers, enter_with_token
from downpour_common.errors import ModelError

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_DIMS = 8


class Branches(nn.ModuleList):
    """Modules that all take the same inputs, and whose outputs are put together.

    ``combine``: "cat" puts them one after another along ``dim``; "sum" adds them up. A plain module without a launcher;
    under tensor parallelism each rank keeps and computes some of the branches. While training, each branch draws its
    random numbers (dropout) from a seed of its own, drawn from torch's generator: the split gives what the whole gives.
    Raises :class:`ModelError` if there are no branches or ``combine`` is something else.
    """

    def __init__(self, branches: Iterable[nn.Module], combine: Literal["cat", "sum"] = "cat", dim: int = 1) -> None:
        super().__init__(branches)
        if combine not in ("cat", "sum") or not len(self):
            raise ModelError(
                f'Branches(..., combine={combine!r}) of {len(self)}: give some modules, and "cat" or "sum"'
            )
        self.combine = combine
        self.dim = dim

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The branches' outputs, combined."""
        return self._combined([out for _, out in self._outputs(range(len(self)), inputs)])

    def _outputs(self, indices: Sequence[int], inputs: tuple[Any, ...]) -> list[tuple[int, torch.Tensor]]:
        if not self.training:
            return [(index, self[index](*inputs)) for index in indices]
        seed = int(torch.randint(2**62, ()))
        devices = sorted({x.device.index for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda})
        outputs = []
        with torch.random.fork_rng(devices):
            for index in indices:
                torch.default_generator.manual_seed(seed + index)
                for device in devices:
                    torch.cuda.default_generators[device].manual_seed(seed + index)
                outputs.append((index, self[index](*inputs)))
        return outputs

    def _combined(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        if self.combine == "cat":
            return torch.cat(outputs, self.dim)
        total = outputs[0]
        for out in outputs[1:]:
            total = total + out
        return total

    def extra_repr(self) -> str:
        """How the outputs are combined."""
        return f"combine={self.combine!r}, dim={self.dim}"


class Elsewhere(nn.Module):
    """Stands for a branch that another rank has."""

    def forward(self, *_: Any) -> torch.Tensor:
        """Raises :class:`ModelError`."""
        raise ModelError("this branch is another rank's; call the Branches module, not its children")


def balanced(branches: Branches, width: int) -> tuple[int, ...]:
    """The rank of each branch: the largest first, each to the rank that has the fewest bytes of parameters so far."""
    bytes_of = [sum(p.numel() * p.element_size() for p in branch.parameters()) for branch in branches]
    load, ranks = [(0, 0)] * width, [0] * len(branches)
    for index in sorted(range(len(branches)), key=lambda i: (-bytes_of[i], i)):
        rank = min(range(width), key=lambda r: (load[r], r))
        ranks[index] = rank
        load[rank] = (load[rank][0] + bytes_of[index], load[rank][1] + 1)
    return tuple(ranks)


class Placed(ParallelStyle):
    """The branches of a :class:`Branches` on the ``ranks`` given, or balanced. Whole inputs and outputs."""

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        peers = Peers(device_mesh)
        if not isinstance(module, Branches):
            raise ModelError(
                f"{type(module).__name__} has no branches to place: put parallel modules into downpour.Branches([...])"
            )
        ranks = balanced(module, peers.width) if self.ranks is None else tuple(self.ranks)
        if len(ranks) != len(module) or max(ranks) >= peers.width:
            raise ModelError(
                f"{len(module)} branches over {peers.width} ranks cannot lie at {ranks}: one rank for each"
            )
        learns = any(p.requires_grad for p in module.parameters())
        for index, rank in enumerate(ranks):
            if rank != peers.rank:
                module[index] = Elsewhere()
        module._split = (peers, ranks, learns, {})  # type: ignore[assignment]
        turn(module, _SplitBranches)
        return module


class _SplitBranches:
    _split: tuple[Peers, tuple[int, ...], bool, dict[Any, Any]]

    def forward(self, *inputs: Any) -> torch.Tensor:
        peers, ranks, learns, known = self._split
        module = cast(Branches, self)
        # The token ties this rank into the backward, even if it has no branch or its branch needs no gradient.
        token = torch.zeros((), requires_grad=learns and torch.is_grad_enabled())
        entered: list[Any] = []
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                same, more = enter_with_token(peers, x)
                token = token.to(more.device) + more
                entered.append(same)
            else:
                entered.append(x)
        mine = [index for index, rank in enumerate(ranks) if rank == peers.rank]
        outputs = [out for _, out in module._outputs(mine, tuple(entered))]
        key = (module.training, *((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in inputs))
        device = next((x.device for x in (*outputs, *inputs) if isinstance(x, torch.Tensor)), token.device)
        if key not in known:
            known[key] = _shapes(peers, ranks, outputs, device)
        shapes, dtype = known[key]
        if [tuple(out.shape) for out in outputs] != [shapes[index] for index in mine]:
            raise ModelError("a branch of downpour.Branches gave another shape for inputs of the same shapes as before")
        whole = _Exchange.apply(peers, ranks, shapes, dtype, token.to(device), *outputs)  # type: ignore[no-untyped-call]
        return module._combined(list(whole))


def _shapes(
    peers: Peers, ranks: tuple[int, ...], outputs: list[torch.Tensor], device: torch.device
) -> tuple[list[tuple[int, ...]], torch.dtype]:
    """Every branch's output shape, and their dtype, told once for each shape of inputs."""
    if any(out.dtype not in _DTYPES or out.dim() > _MOST_DIMS for out in outputs):
        raise ModelError(f"the branches of downpour.Branches must give floats of at most {_MOST_DIMS} dimensions")
    table = torch.zeros(len(ranks), 2 + _MOST_DIMS, dtype=torch.int64)
    for index, out in zip((i for i, rank in enumerate(ranks) if rank == peers.rank), outputs, strict=True):
        table[index, : 2 + out.dim()] = torch.tensor([_DTYPES.index(out.dtype), out.dim(), *out.shape])
    table = table.to(device)
    dist.all_reduce(table, group=peers.group)
    rows = table.tolist()
    if len({row[0] for row in rows}) > 1:
        raise ModelError("the branches of downpour.Branches give different dtypes; convert their outputs to one")
    return [tuple(row[2 : 2 + row[1]]) for row in rows], _DTYPES[rows[0][0]]


class _Exchange(torch.autograd.Function):
    """Every branch's output on every rank; each rank's gradients are those of its own branches."""

    @staticmethod
    def forward(
        ctx: Any,
        peers: Peers,
        ranks: tuple[int, ...],
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        token: torch.Tensor,
        *outputs: torch.Tensor,
    ) -> Any:
        ctx.mine = [index for index, rank in enumerate(ranks) if rank == peers.rank]
        numel = [torch.Size(shape).numel() for shape in shapes]
        longest = max(sum(n for n, r in zip(numel, ranks, strict=True) if r == rank) for rank in range(peers.width))
        sent = torch.zeros(longest, dtype=dtype, device=token.device)
        at = 0
        for out in outputs:
            sent[at : at + out.numel()] = out.reshape(-1)
            at += out.numel()
        received = [torch.empty_like(sent) for _ in range(peers.width)]
        dist.all_gather(received, sent, group=peers.group)
        at_of = [0] * peers.width
        found = []
        for shape, count, rank in zip(shapes, numel, ranks, strict=True):
            found.append(received[rank][at_of[rank] : at_of[rank] + count].view(shape).clone())
            at_of[rank] += count
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        token = torch.zeros((), device=gradients[0].device)
        return None, None, None, None, token, *(gradients[index] for index in ctx.mine)
