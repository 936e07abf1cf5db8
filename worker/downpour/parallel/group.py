"""The ranks of one replica, and how they speak to each other: torch.distributed, gloo on CPUs and NCCL on GPUs.

A replica that is a group of workers has ``sum(widths)`` ranks: stage 0 has the first ``widths[0]`` of them, and so on.
The first rank of a stage is its *head*; rank 0 is the replica's *lead*, the one that takes data and speaks for it.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh

from downpour.spans import span
from downpour_common.errors import ConfigError, MateLost

_LATE = re.compile(r"timed? ?out", re.IGNORECASE)
_GONE = re.compile(
    r"closed by peer|connection (was )?(closed|reset|refused)|broken pipe|remote (process|error)|failed to recv",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in its replica. ``widths``: tensor ranks of each pipeline stage."""

    rank: int
    widths: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Ranks of the replica."""
        return sum(self.widths)

    @property
    def stage(self) -> int:
        """The pipeline stage that this rank belongs to."""
        return next(s for s in range(len(self.widths)) if self.rank < sum(self.widths[: s + 1]))

    @property
    def tensor_rank(self) -> int:
        """This rank's number within its stage; 0 is the stage's head."""
        return self.rank - self.head_of(self.stage)

    @property
    def width(self) -> int:
        """Ranks of this rank's stage."""
        return self.widths[self.stage]

    def head_of(self, stage: int) -> int:
        """The first rank of a stage."""
        return sum(self.widths[:stage])

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """The ranks of a stage."""
        head = self.head_of(stage)
        return tuple(range(head, head + self.widths[stage]))


class Group:
    """A rank's connections to the others of its replica. All methods but ``close`` are collective, with a deadline."""

    def __init__(self, place: Place, store: Store, device: torch.device, timeout_s: float) -> None:
        if dist.is_initialized():
            raise ConfigError(
                "the script has called torch.distributed.init_process_group; with --tensor and --pipeline Downpour "
                "does, and all torch.distributed calls of the script would mix with its own: remove them"
            )
        self.place = place
        self.device = device
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        deadline = self.deadline = datetime.timedelta(seconds=timeout_s)
        hook = sys.excepthook
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=deadline)
        sys.excepthook = hook  # torch's names the rank in each line of a traceback, as the job's log does already
        assert dist.group.WORLD is not None
        self.all: dist.ProcessGroup = dist.group.WORLD
        self.tensor: dist.ProcessGroup = self.all
        """the ranks of this rank's stage"""
        if len(place.widths) > 1:
            for stage in range(len(place.widths)):
                made = dist.new_group(list(place.ranks_of(stage)), timeout=deadline)
                if stage == place.stage:
                    assert made is not None
                    self.tensor = made
        self.heads: dist.ProcessGroup | None = None
        """the heads of the stages, on those ranks; the ranks in it are the stages"""
        if max(place.widths) > 1 and len(place.widths) > 1:
            heads = dist.new_group([place.head_of(s) for s in range(len(place.widths))], timeout=deadline)
            self.heads = heads if place.tensor_rank == 0 else None
        elif len(place.widths) > 1:
            self.heads = self.all

    def tensor_mesh(self) -> DeviceMesh:
        """The ranks of this stage, for ``torch.distributed.tensor``."""
        return DeviceMesh.from_group(self.tensor, self.device.type, mesh_dim_names=("tensor",))

    def broadcast_buffer(self, data: torch.Tensor | None, source: int = 0) -> torch.Tensor:
        """The bytes (uint8, flat, on the host) that rank ``source`` gives, on all ranks."""
        size = torch.tensor([0 if data is None else data.numel()])
        dist.broadcast(size, source, group=self.all)
        held = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        if held.numel():
            with span("exchange", bytes=held.nbytes):
                dist.broadcast(held, source, group=self.all)
        return held

    def broadcast_bytes(self, data: bytes = b"", source: int = 0) -> bytes:
        """What rank ``source`` gives, on all ranks."""
        mine = None
        if self.place.rank == source:
            mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return self.broadcast_buffer(mine, source).numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What every rank gives, by rank, on all ranks."""
        return [self.broadcast_bytes(data, rank) for rank in range(self.place.ranks)]

    def broadcast(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Overwrite ``tensors`` on all ranks by those of ``source``; shapes and dtypes are the same on all."""
        for tensor in tensors:
            dist.broadcast(tensor, source, group=self.all)

    def reduce(self, values: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """``values`` added up over the ranks, or their ``max`` or ``min``, in place."""
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(values, operations[operation], group=self.all)
        return values

    def lost(self, error: BaseException, replica: int) -> MateLost | None:
        """Not collective: what ``error`` means if it comes from another rank of the replica that is no more, or that
        does not do its part."""
        text, place = str(error), self.place
        if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "/gloo/" in text):
            return None
        first = replica * place.ranks
        mates = [f"worker/{first + rank}" for rank in range(place.ranks) if rank != place.rank]
        peer = mates[0] if len(mates) == 1 else f"one of {', '.join(mates)}"
        each = "the same steps, calls of the model and of downpour's functions; is_chief() must not decide about them"
        if _LATE.search(text):
            late = f"has not done its part of replica {replica} within {self.deadline.total_seconds():g} s"
            longer = "raise the limit with --set timeout_s=… if the work really takes longer"
            return MateLost(peer, True, f"{peer} {late}. All ranks of a replica run {each}. Look at its log; {longer}.")
        if _GONE.search(text):
            ended = f"has ended, or ended its script, before the other ranks of replica {replica}"
            return MateLost(peer, False, f"{peer} {ended}. Look at its log; all of them run {each}.")
        return None

    def close(self) -> None:
        """Leave; others that still wait for this rank get an error."""
        if dist.is_initialized():
            dist.destroy_process_group()
