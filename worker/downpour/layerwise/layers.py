"""A model cut into layers: what is fetched and dropped together, and needs how much memory.

A *unit* is a module with parameters of its own, or one of ``torch.nn`` that computes with its children's parameters
itself (attention, for example). Small units that follow each other are one layer. A parameter that several units use
(tied weights) belongs to the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from downpour_common.errors import ModelError
from downpour_common.layout import ModelSpec
from downpour_common.sizes import format_bytes

JOINED_BYTES = 1 << 20
"""Modules are joined up to this: smaller messages cost more than they carry."""
JOINED_SHARE = 16
"""... and up to this part of the budget."""
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)


@dataclass(frozen=True, slots=True)
class Layer:
    """Units that are fetched together. ``parameters``: their names in the model's specification."""

    index: int
    name: str
    units: tuple[nn.Module, ...]
    parameters: tuple[str, ...]
    weights: int
    """bytes, frozen ones included"""
    gradients: int
    """bytes"""
    largest: int
    """bytes of the largest gradient: autograd makes it before it is brought to its place among the others"""

    @property
    def needs(self) -> int:
        """Bytes while its backward runs."""
        return self.weights + self.gradients + self.largest


@dataclass(frozen=True, slots=True)
class Layers:
    """The model's layers, which ones each unit uses, and ``budget``: bytes that are held at most."""

    all: tuple[Layer, ...]
    used_by: Mapping[nn.Module, tuple[int, ...]]
    budget: int


def divide(model: nn.Module, spec: ModelSpec, tensors: Mapping[str, torch.Tensor], memory: int) -> Layers:
    """Cut ``model``, whose parameters are ``tensors`` of ``spec``, into layers. ``memory``: the budget in bytes; 0: as
    little as lets one layer be fetched while another computes.

    Raises :class:`ModelError` for a layer that exceeds the budget alone.
    """
    named = {id(tensors[t.name]): t for t in spec.tensors if t.kind != "buffer"}
    joined = min(JOINED_BYTES, memory // JOINED_SHARE) if memory else JOINED_BYTES
    layers: list[Layer] = []
    owner: dict[int, int] = {}
    used_by: dict[nn.Module, tuple[int, ...]] = {}
    for name, unit, parameters in _units(model, "", set()):
        own = [named[id(p)] for p in parameters if id(p) not in owner]
        new = Layer(
            len(layers),
            name,
            (unit,),
            tuple(t.name for t in own),
            sum(t.nbytes for t in own),
            sum(t.nbytes for t in own if t.kind == "trainable"),
            max((t.nbytes for t in own if t.kind == "trainable"), default=0),
        )
        if layers and layers[-1].weights + new.weights <= joined:
            layers[-1] = _join(layers[-1], new)
        elif own:
            layers.append(new)
        owner |= {id(p): len(layers) - 1 for p in parameters if id(p) not in owner}
        used_by[unit] = tuple(sorted({owner[id(p)] for p in parameters}))
    return Layers(tuple(layers), used_by, _budget(layers, memory))


def in_cells(spec: ModelSpec, layers: Layers) -> ModelSpec:
    """The specification in which each layer lies by itself on the servers."""
    cells = {name: layer.index for layer in layers.all for name in layer.parameters}
    return replace(spec, tensors=tuple(replace(t, cell=cells.get(t.name, 0)) for t in spec.tensors))


def _units(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Each with its name and the parameters that it computes with."""
    if module in seen:
        return
    seen.add(module)
    whole = _computes_with_its_children(module)
    parameters = list(module.parameters(recurse=whole))
    for child in module.children():  # which are not called: their owner takes the parameters out of them
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            seen.add(child)
            parameters += child.parameters()
    if parameters:
        yield name or type(module).__name__, module, parameters
    if whole:
        seen.update(module.modules())
        return
    for child_name, child in module.named_children():
        yield from _units(child, f"{name}.{child_name}" if name else child_name, seen)


def members(unit: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are the unit's, children first."""
    if not _computes_with_its_children(unit):
        return [unit]
    return [m for child in unit.children() for m in _children_first(child)] + [unit]


def _children_first(module: nn.Module) -> list[nn.Module]:
    return [m for child in module.children() for m in _children_first(child)] + [module]


def _computes_with_its_children(module: nn.Module) -> bool:
    library = type(module).__module__.startswith("torch.nn.modules.")
    return library and not isinstance(module, _CONTAINERS) and any(True for _ in module.children())


def _join(layer: Layer, more: Layer) -> Layer:
    return replace(
        layer,
        units=layer.units + more.units,
        parameters=layer.parameters + more.parameters,
        weights=layer.weights + more.weights,
        gradients=layer.gradients + more.gradients,
        largest=max(layer.largest, more.largest),
    )


def _budget(layers: list[Layer], memory: int) -> int:
    largest = max(layers, key=lambda layer: layer.needs)
    if not memory:
        return largest.needs + max(layer.weights for layer in layers)
    if largest.needs > memory:
        raise ModelError(
            f"layer {largest.name} alone needs {format_bytes(largest.needs)} (weights {format_bytes(largest.weights)}, "
            f"gradients {format_bytes(largest.gradients)}, the largest of these once more while it is made), and "
            f"memory is {format_bytes(memory)}; give it more (--set memory={largest.needs}), or cut the layer "
            "into smaller modules"
        )
    return memory
