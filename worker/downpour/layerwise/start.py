"""How a job with ``fetch=layers`` begins: the chief makes the first weights layer by layer, sends and drops them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from downpour.client.parameters import ParameterClient
from downpour.context import WorkerContext
from downpour.exchange import StateExchange
from downpour.layerwise.layers import Layers, members
from downpour.layerwise.ledger import Ledger
from downpour.layerwise.parameters import AbsentParameter
from downpour.layerwise.space import Block, LayerSpace
from downpour.staging import Staging
from downpour.takeover import Beginning
from downpour_common.errors import ModelError
from downpour_common.layout import Kind

_LISTS = (nn.ParameterList, nn.ParameterDict)
"""They hold parameters that their owner makes."""


class Unmade:
    """The modules of a model that lie on the meta device, and are to be made. Their buffers are on the host from
    now on.

    Raises :class:`ModelError` for a module that cannot make its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: set[nn.Module] = set()
        self.local: set[nn.Module] = set()
        """of them, those with buffers that are every worker's own"""
        host: dict[torch.Tensor, torch.Tensor] = {}
        for name, module in model.named_modules():
            of_lists = [p for child in module.children() if isinstance(child, _LISTS) for p in child.parameters()]
            parameters = any(p.is_meta for p in [*module.parameters(recurse=False), *of_lists])
            buffers = [(key, b) for key, b in module._buffers.items() if b is not None and b.is_meta]
            if isinstance(module, _LISTS) or not (parameters or buffers):
                continue
            if isinstance(module, nn.RNNBase):
                # Weak references would keep the parameters from being exchanged; its forward does without.
                module._flat_weight_refs = [None] * len(module._flat_weight_refs)
            if _reset_of(module) is None:
                raise ModelError(
                    f"module {name or 'the model'} ({type(module).__name__}) is on the meta device and has no "
                    "reset_parameters method to make its parameters and buffers with; give it one, or make it outside "
                    "of `with torch.device('meta')`"
                )
            self.modules.add(module)
            if any(key in module._non_persistent_buffers_set for key, _ in buffers):
                self.local.add(module)
            for key, buffer in buffers:
                if buffer not in host:
                    host[buffer] = torch.zeros_like(buffer, device="cpu")
                module._buffers[key] = host[buffer]

    @torch.no_grad()
    def make(self, module: nn.Module) -> None:
        """Have the module make its parameters and buffers, if they are not."""
        reset = _reset_of(module)
        if module in self.modules and reset is not None:
            reset()


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    found: Callable[[], object] | None = getattr(module, "reset_parameters", None)
    return found or getattr(module, "_reset_parameters", None)


class LayerExchange(StateExchange):
    """As :class:`StateExchange`, but for parameters, which are here for moments only.

    Weights that the script's model has are the chief's first ones; modules' ``reset_parameters`` make others. After
    :meth:`start` or :meth:`take_over` all are absent.
    """

    def __init__(
        self,
        context: WorkerContext,
        space: LayerSpace,
        staging: Staging,
        client: ParameterClient,
        is_chief: Callable[[], bool],
        model: nn.Module,
        unmade: Unmade,
        layers: Layers,
        ledger: Ledger,
    ) -> None:
        super().__init__(context, space, staging, client, is_chief)
        self._here = space
        self._model = model
        self._unmade = unmade
        self._cut = layers
        self._ledger = ledger

    def start(self, restored: bool) -> Beginning:
        """See :class:`StateExchange`."""
        if restored or not self._is_chief():
            self._make_local_buffers()
        begins = super().start(restored)
        self._hide()
        return begins

    def take_over(self, restored: bool, leave_point: Callable[[], None]) -> Beginning:
        """See :class:`StateExchange`."""
        self._make_local_buffers()
        begins = super().take_over(restored, leave_point)
        self._hide()
        return begins

    def _lend_others(self) -> dict[int, torch.Tensor]:
        others = self._flats("buffer")
        self._staging.lend(others)
        return others

    def _initialise(self) -> None:
        made: set[nn.Parameter] = set()
        for layer in self._cut.all:
            own = [block for block in self._here.blocks if block.layer is layer]
            beside = [b for unit in layer.units for b in self._here.used_by[unit] if b.layer is not layer]
            self._open([*own, *beside])
            for unit in layer.units:
                self._make(unit, made)
            self._client.initialise(chunk for block in own for chunk in block.chunks)
            self._close([*own, *beside])
        with_parameters = {module for unit in self._cut.used_by for module in members(unit)}
        for module in self._model.modules():
            if module not in with_parameters:
                self._unmade.make(module)
        self._staging.lend(self._flats("buffer"))
        self._client.initialise(self._buffer_chunks())

    def _make(self, unit: nn.Module, made: set[nn.Parameter]) -> None:
        """What is tied to a unit before this one stays as that has made it."""
        parameters = {p for module in members(unit) for p in module.parameters(recurse=False)}
        before = {p: p.detach().clone() for p in parameters & made}
        for module in members(unit):
            self._unmade.make(module)
        with torch.no_grad():
            for parameter, values in before.items():
                parameter.copy_(values)
        made |= parameters

    def _make_local_buffers(self) -> None:
        for unit, blocks in self._here.used_by.items():
            if any(module in self._unmade.local for module in members(unit)):
                self._open(blocks)
                for module in members(unit):
                    self._unmade.make(module)
                self._close(blocks)
        for module in self._unmade.local:
            if module not in self._here.used_by:
                self._unmade.make(module)

    def _open(self, blocks: Iterable[Block]) -> None:
        for block in dict.fromkeys(blocks):
            self._ledger.take(block.nbytes)
            self._here.make_room(block)
            with torch.no_grad():
                for p in block.placed:
                    if p.made and not isinstance(p.parameter, AbsentParameter):
                        self._here.view(p).copy_(p.parameter)
            self._here.show(block)

    def _close(self, blocks: Iterable[Block]) -> None:
        for block in dict.fromkeys(blocks):
            self._here.hide(block)
            self._ledger.give(block.nbytes)

    def _hide(self) -> None:
        for block in self._here.blocks:
            self._here.hide(block)

    def _fetch(self, *kinds: Kind) -> None:
        self._client.pull(c for c in self._here.layout.chunks if c.kind in kinds and c.kind == "buffer")

    def _pull_round(self, number: int) -> None:
        """Layers are fetched of the round that they are needed in."""
