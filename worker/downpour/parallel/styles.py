"""Parallel styles for what torch's lack: convolutions, what may stand between them, and sizes that divide unevenly.

A style replaces a module's parameters by this rank's part, notes which part that is, and gives the module a class
derived from its own, so that names, types and ``isinstance`` stay.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from downpour.parallel.tensor_comm import Peers, Span, add_up, enter, gather, take
from downpour_common.errors import ModelError
from downpour_common.layout import Part


def keep(module: nn.Module, name: str, dim: int, *ranges: Span) -> None:
    """Replace the parameter or buffer ``name`` of ``module`` by its ``ranges`` along ``dim``, and note the part."""
    whole = getattr(module, name)
    if whole is None:
        return
    with torch.no_grad():
        mine = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    if isinstance(whole, nn.Parameter):
        module.register_parameter(name, nn.Parameter(mine, whole.requires_grad))
    else:
        module.register_buffer(name, mine, persistent=name not in module._non_persistent_buffers_set)
    parts = module.__dict__.setdefault("_downpour_parts", {})
    parts[name] = Part(tuple(whole.shape), dim, ranges)


def kept(module: nn.Module, name: str) -> Part | None:
    """Which part of its tensor ``name`` a module has kept; None: all of it, or it is torch's to say."""
    return cast("Part | None", module.__dict__.get("_downpour_parts", {}).get(name))


_classes: dict[tuple[type, type], type] = {}


def turn(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the methods of ``mixin`` before those of its own class."""
    own = type(module)
    made = _classes.get((mixin, own))
    if made is None:
        made = _classes[mixin, own] = type(f"{mixin.__name__.strip('_')}{own.__name__}", (mixin, own), {})
    module.__class__ = made


def feature_dim(module: nn.Module) -> int:
    """The dimension, counted from the end, that holds a module's features or channels."""
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)
    return -1


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, convolution or embedding."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Embedding)
    return module.num_embeddings, module.embedding_dim


class Columns(ParallelStyle):
    """Split by outputs: a linear layer's rows of ``weight``, a convolution's filters, an embedding's columns.

    Takes a whole input. ``whole``: gives the whole output, else this rank's outputs.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (nn.Linear, nn.Embedding, _ConvNd)) or getattr(module, "groups", 1) != 1:
            raise _unfit(module, "by columns")
        peers = Peers(device_mesh)
        spans = peers.spans(sizes(module)[1])
        keep(module, "weight", 1 if isinstance(module, (nn.Embedding, _ConvTransposeNd)) else 0, spans[peers.rank])
        if hasattr(module, "bias"):
            keep(module, "bias", 0, spans[peers.rank])
        module._split = (peers, spans, self.whole)  # type: ignore[assignment]
        turn(module, _SplitColumns)
        return module


class _SplitColumns:
    _split: tuple[Peers, tuple[Span, ...], bool]

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        peers, spans, whole = self._split
        first = inputs[0]
        if first.is_floating_point():
            first = enter(peers, first)
        out: torch.Tensor = super().forward(first, *inputs[1:], **named)  # type: ignore[misc]
        return gather(peers, out, feature_dim(cast(nn.Module, self)), spans) if whole else out


class Rows(ParallelStyle):
    """Split by inputs: a linear layer's columns of ``weight``, a convolution's input channels. Gives the whole output.

    Takes this rank's inputs, or the whole input, of which it takes its slice. ``unit``: inputs that stay together, as
    the pixels of a channel after a flatten.
    """

    def __init__(self, *, unit: int = 1) -> None:
        self.unit = unit

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        fits = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
        if not fits or isinstance(module, _ConvTransposeNd):
            raise _unfit(module, "by rows")
        peers = Peers(device_mesh)
        spans = peers.spans(sizes(module)[0], self.unit)
        keep(module, "weight", 1, spans[peers.rank])
        module._split = (peers, spans)  # type: ignore[assignment]
        turn(module, _SplitRows)
        return module


class _SplitRows:
    _split: tuple[Peers, tuple[Span, ...]]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        peers, spans = self._split
        module = cast(nn.Module, self)
        dim = feature_dim(module)
        if inputs.shape[dim] == spans[-1][1]:
            inputs = take(peers, inputs, dim, spans)
        if isinstance(module, _ConvNd):
            term = module._conv_forward(inputs, self.weight, None)
        else:
            term = F.linear(inputs, self.weight)
        out = add_up(peers, term)
        # Added here, once: each rank's term must not have it.
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, *[1] * (-1 - dim))


class Channels(ParallelStyle):
    """For what stands between ``columns`` and ``rows`` and treats each channel, or group of channels, by itself.

    Batch norm (its statistics are split too), group norm and convolutions whose groups divide by the width, dropout.
    ``size``: all channels, and ``dim``: where they are, for a dropout, whose mask is this rank's slice of the mask of
    the unsplit model: the ranks' random generators stay alike, and the numbers are those of the unsplit run.
    """

    def __init__(self, *, size: int = 0, dim: int = -1) -> None:
        self.size = size
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        peers = Peers(device_mesh)
        if isinstance(module, _DropoutNd) and self.size:
            module._split = (peers.spans(self.size)[peers.rank], self.size, self.dim)  # type: ignore[assignment]
            turn(module, _SplitDropout)
            return module
        if isinstance(module, _BatchNorm):
            mine = peers.spans(module.num_features)[peers.rank]
            for name in ("weight", "bias", "running_mean", "running_var"):
                keep(module, name, 0, mine)
            module.num_features = mine[1] - mine[0]
            return module
        groups = getattr(module, "groups", getattr(module, "num_groups", 0))
        if (
            not isinstance(module, (_ConvNd, nn.GroupNorm))
            or groups % peers.width
            or isinstance(module, _ConvTransposeNd)
        ):
            raise _unfit(module, "by channels")
        outputs = module.out_channels if isinstance(module, _ConvNd) else module.num_channels
        for name in ("weight", "bias"):
            keep(module, name, 0, peers.spans(outputs)[peers.rank])
        if isinstance(module, _ConvNd):
            module.groups //= peers.width
        else:
            module.num_groups //= peers.width
            module.num_channels //= peers.width
        return module


class _SplitDropout:
    _split: tuple[Span, int, int]
    p: float
    training: bool

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        (start, stop), size, dim = self._split
        if not self.training or self.p == 0:
            return inputs
        shape = list(inputs.shape)
        shape[dim] = size
        if not isinstance(self, nn.Dropout):  # Dropout2d and its like drop whole channels
            shape[dim + 1 :] = [1] * (-1 - dim)
        ones = torch.ones(shape, dtype=inputs.dtype, device=inputs.device)
        inplace, cast(Any, self).inplace = cast(Any, self).inplace, False
        mask = super().forward(ones)  # type: ignore[misc]
        cast(Any, self).inplace = inplace
        mine: torch.Tensor = mask.narrow(dim, start, stop - start)
        return inputs * mine


def _unfit(module: nn.Module, how: str) -> ModelError:
    return ModelError(
        f"{type(module).__name__} cannot be split {how} ({module.extra_repr()}); leave it out of Plan(tensor=...), or "
        'give it "replicate"'
    )
