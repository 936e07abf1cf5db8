"""The settings that make a model lighter without changing what it computes, in one place for the session."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from downpour.context import Autocast


class Lighter:
    """``autocast`` and ``activation_checkpointing``, for one model. Made before the model is split, and applied after:
    splitters look for classes and trace forwards, which the settings replace."""

    def __init__(self, model: nn.Module, autocast: Autocast, activation_checkpointing: bool) -> None:
        self._autocast = autocast
        self.blocks: dict[str, nn.Module] = {}
        """by name, what is going to recompute; a tracer must not look inside"""
        if activation_checkpointing:
            from downpour.activations import repeated_blocks

            self.blocks = repeated_blocks(model)
            if not self.blocks:
                warnings.warn(
                    f"activation_checkpointing: {type(model).__name__} has no nn.ModuleList or nn.Sequential with "
                    "several blocks of one type, so nothing is recomputed; put its repeated blocks into one",
                    stacklevel=3,
                )

    def apply(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        """``modules``: what this worker calls: the model, or its stages of a pipeline."""
        if self.blocks:
            from downpour.activations import recompute

            for block in self.blocks.values():
                recompute(block)
        if self._autocast != "off":
            from downpour.precision import autocast_forward

            for module in modules:
                autocast_forward(module, device, self._autocast)
