"""Joining a job with ``fetch=layers``: what the session does for it in place of flat vectors of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from downpour.client.parameters import ParameterClient
from downpour.context import WorkerContext
from downpour.layerwise.engine import LayerwiseEngine
from downpour.layerwise.layers import Layers, divide, in_cells
from downpour.layerwise.ledger import Ledger
from downpour.layerwise.space import LayerSpace, LayerStaging
from downpour.layerwise.start import LayerExchange, Unmade
from downpour.model import Described, describe
from downpour_common.errors import ConfigError, ModelError
from downpour_common.layout import Layout
from downpour_common.process import return_freed_memory


class Layerwise:
    """One worker's part. Made of what the script made, before the worker registers: ``described`` has a cell for each
    layer. Raises :class:`ModelError` and :class:`ConfigError` for what cannot be trained so, with the way out."""

    def __init__(
        self, context: WorkerContext, model: nn.Module | None, optimizer: torch.optim.Optimizer | None
    ) -> None:
        if model is None or optimizer is None:
            raise ModelError("fetch=layers trains a model's layers; give a model and an optimizer to downpour.prepare")
        _check(context)
        return_freed_memory()
        self._context = context
        self._model = model
        self._unmade = Unmade(model)
        found = describe(model, optimizer, context.buffers, meta=True, own_rule=context.rule)
        if any(t.device.type == "cuda" for t in found.tensors.values()):
            raise ModelError(
                "fetch=layers trains on the CPU, and the model is on a CUDA device; leave it there and train with "
                "fetch=whole, or run with --device cpu"
            )
        self.layers: Layers = divide(model, found.spec, found.tensors, context.memory)
        self.described: Described = replace(found, spec=in_cells(found.spec, self.layers))
        self.ledger = Ledger(self.layers.budget)
        self.read: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
        """the contents of one of the model's tensors, fetched if need be"""

    def space(self, layout: Layout) -> tuple[LayerSpace, LayerStaging]:
        """The worker's part of the parameter space, and the client's memory for it."""
        rounded = self._context.push_dtype == "bfloat16"
        space = LayerSpace(layout, self.described.tensors, self.layers, rounded)
        return space, LayerStaging(space)

    def exchange(
        self, space: LayerSpace, staging: LayerStaging, client: ParameterClient, is_chief: Callable[[], bool]
    ) -> LayerExchange:
        """How it begins."""
        return LayerExchange(
            self._context, space, staging, client, is_chief, self._model, self._unmade, self.layers, self.ledger
        )

    def engine(
        self,
        space: LayerSpace,
        client: ParameterClient,
        optimizer: torch.optim.Optimizer,
        clock: int,
        first_seq: int,
        position: Callable[[], tuple[int, ...]],
        begin: Callable[[], None],
    ) -> LayerwiseEngine:
        """How it goes on; see :class:`LayerwiseEngine`."""
        mode = self._context.parsed_mode
        engine = LayerwiseEngine(space, client, optimizer, mode, clock, first_seq, position, begin, self.ledger)
        self.read = engine.weights_of
        return engine

    def figures(self, moved: Mapping[str, int]) -> dict[str, float]:
        """For the run's metrics: the most bytes of weights and gradients that were here, and that might be; with the
        payload bytes sent and received."""
        held = {"layers_peak_bytes": self.ledger.peak, "layers_budget_bytes": self.ledger.budget}
        return {**held, "layers_moved_bytes": sum(moved.values())}


def _check(context: WorkerContext) -> None:
    """Raises :class:`ConfigError`."""
    c = context
    reasons = {
        "--tensor and --pipeline: the ranks of a replica hold their parts all the time": c.ranks > 1,
        "n_push and n_fetch: local steps need all weights": (c.n_push, c.n_fetch) != (1, 1),
        "fetch_ahead: it keeps a second copy of all weights": c.fetch_ahead,
        "autocast: it keeps rounded copies of all weights": c.autocast != "off",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConfigError(*(f"fetch=layers goes without {reason}; leave one of them out" for reason in found))
