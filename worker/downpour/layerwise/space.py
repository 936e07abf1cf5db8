"""The worker's part of the parameter space while layers come and go: flat tensors that are there only for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from downpour.layerwise.layers import Layer, Layers
from downpour.layerwise.parameters import AbsentParameter, absent, pushed
from downpour.space import FlatSpace
from downpour.staging import HostStaging, pushed_dtype
from downpour_common.errors import ModelError
from downpour_common.layout import Chunk, Kind, Layout, Segment


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Where a parameter lies. ``own``: its class, while its weights are here. ``made``: whether it came with any."""

    name: str
    parameter: nn.Parameter
    segment: int
    start: int
    stop: int
    own: type[nn.Parameter]
    made: bool


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The trainable or the frozen parameters of one layer: what is fetched, pushed and dropped at once."""

    index: int
    layer: Layer
    kind: Kind
    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    placed: tuple[Placed, ...]
    nbytes: int
    gradient_nbytes: int

    @property
    def name(self) -> str:
        """For error messages."""
        return self.layer.name


class LayerSpace(FlatSpace):
    """Flat weights and gradients of the layers that are here, by segment; the model's parameters are views of them, or
    :class:`AbsentParameter`. Buffers are here always. ``rounded``: fp32 gradients are kept and sent as bfloat16.
    """

    def __init__(
        self, layout: Layout, tensors: Mapping[str, torch.Tensor], layers: Layers, rounded: bool = False
    ) -> None:
        hollow = tuple(s if s.kind == "buffer" else replace(s, pieces=()) for s in layout.segments)
        super().__init__(replace(layout, segments=hollow), tensors, torch.device("cpu"))
        self.layout, self.column = layout, layout.of_column(0)
        self.weights.clear()
        self.gradients.clear()
        self._rounded = rounded
        self._at: dict[int, tuple[Block, int]] = {}
        """by address of the memory: the block and the segment whose weights lie there"""
        self.place: dict[nn.Parameter, tuple[Block, Placed]] = {}
        """of every parameter"""
        blocks: list[Block] = []
        by_layer: dict[int, tuple[Block, ...]] = {}
        chunks: dict[int, list[Chunk]] = {}
        for chunk in layout.chunks:
            chunks.setdefault(chunk.segment, []).append(chunk)
        for layer in layers.all:
            made: list[Block] = []
            for kind in ("trainable", "frozen"):
                segments = tuple(s for s in layout.segments if (s.kind, s.cell) == (kind, layer.index))
                if segments:
                    made.append(self._block(len(blocks) + len(made), layer, segments, chunks))
            blocks += made
            by_layer[layer.index] = tuple(made)
        self.blocks = tuple(blocks)
        self.used_by: dict[nn.Module, tuple[Block, ...]] = {
            unit: tuple(block for i in indices for block in by_layer[i]) for unit, indices in layers.used_by.items()
        }

    def _block(
        self, index: int, layer: Layer, segments: tuple[Segment, ...], chunks: Mapping[int, Iterable[Chunk]]
    ) -> Block:
        placed = []
        for segment in segments:
            for piece in segment.pieces:
                name = self.layout.model.tensors[piece.tensor].name
                made = not self._tensors[name].is_meta
                parameter = _on_host(name, self._tensors[name])
                placed.append(Placed(name, parameter, segment.index, piece.start, piece.stop, type(parameter), made))
        mine = tuple(c for s in segments for c in chunks.get(s.index, ()))
        kind = segments[0].kind
        nbytes = sum(c.nbytes for c in mine)
        block = Block(index, layer, kind, segments, mine, tuple(placed), nbytes, nbytes if kind == "trainable" else 0)
        self.place |= {p.parameter: (block, p) for p in placed}
        return block

    # ------------------------------------------------------------ weights

    def make_room(self, block: Block) -> None:
        """Memory for the weights of ``block``, whatever is in it."""
        for segment in block.segments:
            flat = torch.empty(segment.numel, dtype=getattr(torch, segment.dtype))
            self.weights[segment.index] = flat
            self._at[flat.data_ptr()] = block, segment.index

    def show(self, block: Block) -> None:
        """The model's parameters are what lies in the memory of ``block`` from now on."""
        for p in block.placed:
            p.parameter.__class__ = p.own
            p.parameter.data = self.view(p)

    def hide(self, block: Block) -> None:
        """The model's parameters are absent from now on, and their memory is free once nothing computes with it."""
        for p in block.placed:
            p.parameter.data = absent(p.parameter)
            p.parameter.__class__ = AbsentParameter
        for segment in block.segments:
            flat = self.weights.pop(segment.index, None)
            if flat is not None:
                del self._at[flat.data_ptr()]

    def view(self, p: Placed) -> torch.Tensor:
        """The weights of a parameter that are here."""
        return self.weights[p.segment][p.start : p.stop].view(p.parameter.shape)

    def found(self, tensor: torch.Tensor) -> tuple[Block, int] | None:
        """The block and the segment in whose memory ``tensor`` lies; None if it is something else."""
        return self._at.get(tensor.untyped_storage().data_ptr())

    # ------------------------------------------------------------ gradients

    def take_gradient(self, block: Block, p: Placed) -> None:
        """Bring the parameter's gradient to its place in the block's. Raises :class:`ModelError` for a sparse one."""
        found = p.parameter.grad
        assert found is not None
        if found.is_sparse:
            raise ModelError(f"parameter {p.name} has a sparse gradient; make its module with sparse=False")
        if p.segment not in self.gradients:
            for segment in block.segments:
                dtype = pushed_dtype(torch.empty(0, dtype=getattr(torch, segment.dtype)), self._rounded)
                self.gradients[segment.index] = torch.zeros(segment.numel, dtype=dtype)
        self.gradients[p.segment][p.start : p.stop].view(p.parameter.shape).copy_(found)
        p.parameter.grad = pushed(p.parameter)

    def no_gradient(self, block: Block) -> None:
        """A gradient of zeros for what has none."""
        for segment in block.segments:
            if segment.index not in self.gradients:
                dtype = pushed_dtype(torch.empty(0, dtype=getattr(torch, segment.dtype)), self._rounded)
                self.gradients[segment.index] = torch.zeros(segment.numel, dtype=dtype)

    def end_gradient(self, block: Block) -> None:
        """The block's gradient is not needed any more."""
        for segment in block.segments:
            self.gradients.pop(segment.index, None)

    def has_gradient(self, block: Block) -> bool:
        """Whether some of it is here."""
        return block.segments[0].index in self.gradients

    def non_finite_in(self, block: Block) -> str | None:
        """The first parameter of ``block`` whose gradient holds NaN or Inf."""
        parts = ((p.name, self.gradients[p.segment][p.start : p.stop]) for p in block.placed)
        return next((name for name, part in parts if not torch.isfinite(part).all()), None)

    def zero_gradients(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.place:
            parameter.grad = None

    def check_frozen(self) -> None:
        """Raises :class:`ModelError` if a frozen parameter has got a gradient."""
        for parameter, (block, p) in self.place.items():
            if block.kind == "frozen" and parameter.requires_grad and parameter.grad is not None:
                raise ModelError(
                    f"parameter {p.name} was frozen when prepare was called and has a gradient now; prepare it "
                    "trainable, and set its group's lr to 0 for as long as it should stay as it is"
                )


class LayerStaging(HostStaging):
    """What is sent and received is what is here at that moment."""

    def __init__(self, space: LayerSpace) -> None:
        super().__init__(space)
        self._weights, self._sources = space.weights, space.gradients


def _on_host(name: str, tensor: torch.Tensor) -> nn.Parameter:
    """The parameter itself; one on the meta device becomes, as the same object, one of the host without memory."""
    assert isinstance(tensor, nn.Parameter)
    if tensor.is_meta:
        stand_in = nn.Parameter(absent(tensor), requires_grad=tensor.requires_grad)
        try:
            torch.utils.swap_tensors(tensor, stand_in)
        except RuntimeError as error:
            raise ModelError(
                f"parameter {name} is on the meta device, and something beside the model holds on to it ({error}); "
                "make that module outside of `with torch.device('meta')`"
            ) from None
    return tensor
