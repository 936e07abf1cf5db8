"""The worker's copy of the parameter space: flat tensors, with the model's parameters and gradients as views."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from downpour_common.errors import ModelError
from downpour_common.layout import Chunk, Layout, SharedLayout


class FlatSpace:
    """Flat weights of all trainable segments, and flat gradients.

    ``param.data`` and ``param.grad`` become views, so a chunk is sent and received without gathering. ``others``
    (buffers and frozen tensors) keep their own memory; they are copied through flat tensors when they travel.
    ``memory``, laid out as :class:`SharedLayout`, takes the place of memory of its own.

    ``column``: the worker's rank in its replica; ``tensors`` are those of :attr:`Layout.of_column`, and nothing else of
    the layout has memory here. Of a ``DTensor`` this rank's part is meant: it becomes a view, and so does that of its
    gradient, which is a ``DTensor`` of the same placement.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        memory: memoryview | None = None,
        column: int = 0,
    ) -> None:
        self.layout = layout
        self.column = layout.of_column(column)
        """what of the layout is here"""
        self.device = device
        self.weights: dict[int, torch.Tensor] = {}
        self.gradients: dict[int, torch.Tensor] = {}
        self._tensors = tensors
        self.watched: list[tuple[torch.nn.Parameter, torch.Tensor, tuple[Chunk, ...]]] = []
        """each trainable parameter, its gradient, which is a view, and the chunks that it lies in"""
        self._chunks: dict[int, list[Chunk]] = {}
        self._views: list[tuple[str, torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        shared = SharedLayout(layout, column)
        frozen = [name for name, t in self.column.tensors.items() if t.kind == "frozen"]
        self._frozen = [(n, p) for n in frozen if isinstance(p := tensors[n], torch.nn.Parameter)]
        for segment in self.column.segments:
            if segment.kind == "trainable":
                dtype: torch.dtype = getattr(torch, segment.dtype)
                if memory is None:
                    self.weights[segment.index] = torch.empty(segment.numel, dtype=dtype, device=device)
                    self.gradients[segment.index] = torch.zeros(segment.numel, dtype=dtype, device=device)
                else:
                    at, gradients_at = shared.weights_at(segment.index), shared.gradients_at(segment.index)
                    self.weights[segment.index] = part_of(memory, at, segment.numel, dtype)
                    self.gradients[segment.index] = part_of(memory, gradients_at, segment.numel, dtype)
                for piece in segment.pieces:
                    name = layout.model.tensors[piece.tensor].name
                    self._adopt(name, segment.index, piece.start, piece.stop)

    def _adopt(self, name: str, segment: int, start: int, stop: int) -> None:
        parameter = self._tensors[name]
        assert isinstance(parameter, torch.nn.Parameter)
        here = local(parameter)
        weight = self.weights[segment][start:stop].view(here.shape)
        gradient = self.gradients[segment][start:stop].view(here.shape)
        with torch.no_grad():
            weight.copy_(here)
            if parameter.grad is not None:
                gradient.copy_(_placed_as(parameter, parameter.grad))
        if here is parameter:
            parameter.data = weight
        else:
            gradient = _adopt_local(parameter, weight, gradient)
        parameter.grad = gradient
        self._views.append((name, parameter, weight, gradient))
        chunks = self._chunks.get(segment)
        if chunks is None:
            chunks = self._chunks[segment] = [c for c in self.layout.chunks if c.segment == segment]
        first = bisect_right(chunks, start, key=lambda c: c.start) - 1
        after = bisect_left(chunks, stop, key=lambda c: c.start)
        self.watched.append((parameter, gradient, tuple(chunks[first:after])))

    def gather_gradients(self) -> None:
        """Bring every gradient into the flat tensors; one that is missing counts as zero.

        Raises :class:`ModelError` for sparse gradients and for a model that was moved after ``prepare``.
        """
        for name, parameter, weight, gradient in self._views:
            found = parameter.grad
            if local(parameter).data_ptr() != weight.data_ptr():
                raise ModelError(
                    f"parameter {name} was moved or replaced after downpour.prepare; "
                    "move and convert the model (.to, .half) before prepare"
                )
            if found is None:
                gradient.zero_()
            elif found.is_sparse:
                raise ModelError(f"parameter {name} has a sparse gradient; make its module with sparse=False")
            elif local(found).data_ptr() != local(gradient).data_ptr():
                local(gradient).copy_(_placed_as(parameter, found))
            parameter.grad = gradient
        for name, parameter in self._frozen:
            if parameter.requires_grad and parameter.grad is not None:
                raise ModelError(
                    f"parameter {name} was frozen when prepare was called and has a gradient now; prepare it "
                    "trainable, and set its group's lr to 0 for as long as it should stay as it is"
                )

    def zero_gradients(self) -> None:
        """Zero all gradients and make them views again."""
        for flat in self.gradients.values():
            flat.zero_()
        for _, parameter, _, gradient in self._views:
            parameter.grad = gradient

    def name_non_finite(self) -> str | None:
        """The first parameter whose gradient holds NaN or Inf."""
        return next((name for name, _, _, g in self._views if not torch.isfinite(local(g)).all()), None)

    def flat_of(self, segment: int) -> torch.Tensor:
        """A fresh flat host tensor with the present values of a segment that is not trainable."""
        return torch.cat([t.detach().reshape(-1).cpu() for t in self._members(segment)])

    def spread(self, segment: int, flat: torch.Tensor) -> None:
        """Copy a flat host tensor into the tensors of a segment that is not trainable."""
        at = 0
        with torch.no_grad():
            for tensor in self._members(segment):
                if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
                    tensor.data = tensor.contiguous()  # an expanded tensor's elements share memory
                tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
                at += tensor.numel()

    def _members(self, segment: int) -> Iterator[torch.Tensor]:
        for piece in self.layout.segments[segment].pieces:
            yield local(self._tensors[self.layout.model.tensors[piece.tensor].name])

    def of(self, flats: Mapping[int, torch.Tensor], chunk: Chunk) -> torch.Tensor:
        """The slice of ``flats`` that is ``chunk``."""
        return flats[chunk.segment][chunk.start : chunk.stop]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a ``DTensor`` is in this process; any other tensor itself. ``torch.distributed`` need not be loaded."""
    here: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return here


def _adopt_local(parameter: torch.nn.Parameter, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Let ``weight`` be this process' part of a ``DTensor``, as torch's FSDP does; returns the gradient as one."""
    distributed: Any = parameter
    distributed._local_tensor = weight
    made: torch.Tensor = type(distributed)(gradient, distributed._spec, requires_grad=False)
    return made


def _placed_as(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """This process' part of a parameter's gradient. Collective if that is a ``DTensor`` of another placement: all ranks
    come here for the same parameters, in one order."""
    distributed: Any = gradient
    wanted: Any = parameter
    if local(gradient) is not gradient and tuple(distributed.placements) != tuple(wanted.placements):
        distributed = distributed.redistribute(placements=wanted.placements)
    return local(distributed)


def part_of(memory: memoryview, at: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of ``numel`` elements over ``memory``, from byte ``at`` on."""
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=at)
