"""Models that tests cut into stages, and what a pipeline's activations take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from downpour.parallel.group import Group
from downpour.parallel.pipeline import Pipeline
from downpour.parallel.plan import Plan
from downpour.parallel.split import cut, stage_of


@dataclass(slots=True)
class Built:
    """A model with a batch of eight; ``tied``: names of parameters that two stages use."""

    model: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor
    criterion: Callable[[Any, Any], torch.Tensor]
    plan: Plan | None = None
    tied: set[str] = field(default_factory=set)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _whole(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def mlp() -> Built:
    """Cut automatically."""
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(16, 16), nn.ReLU(inplace=True)]
    return Built(nn.Sequential(*layers, nn.Linear(16, 4)), _numbers(8, 16), _whole(4, 8), nn.CrossEntropyLoss())


class UNet(nn.Module):
    """Skips from the first calls to the last ones, functions, and sizes that cross stages."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.floor = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.join = nn.Conv2d(8, 4, 3, padding=1)
        self.out = nn.Conv2d(5, 2, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.unused = nn.Linear(2, 2)

    def forward(self, image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        high = torch.relu(self.norm(self.into(image)))
        low = torch.relu(self.down(high))
        low = low + self.floor(low)
        joined = self.join(torch.cat([self.up(low), high * self.scale], 1))
        found: torch.Tensor = self.out(torch.cat([joined, image], 1))
        if mask is not None:
            found = found * mask
        return found.reshape(image.size(0), 2, -1).transpose(1, 2).reshape(image.size(0), high.shape[-1], -1, 2)


def unet() -> Built:
    """Cut automatically."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, targets)

    built = Built(UNet(), _numbers(8, 1, 8, 8), _numbers(8, 8, 8, 2), loss)
    for parameter in built.model.get_submodule("unused").parameters():
        parameter.requires_grad_(False)
    return built


class _Ends(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.places = nn.Parameter(torch.randn(1, 6, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 20, bias=False)
        if tie:
            self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(self.words(tokens) + self.places))
        return found.transpose(1, 2)


def transformer() -> Built:
    """Cut automatically."""
    return Built(_Ends(False), _whole(20, 8, 6), _whole(20, 8, 6), nn.CrossEntropyLoss())


def tied() -> Built:
    """The first and the last layer share a weight."""
    tokens = _whole(20, 8, 6)
    return Built(_Ends(True), tokens, tokens, nn.CrossEntropyLoss(), tied={"words.weight"})


MODELS: dict[str, Callable[[], Built]] = {"mlp": mlp, "unet": unet, "transformer": transformer, "tied": tied}


def memory_of(group: Group, schedule: Any, count: int) -> int:
    """Peak bytes that autograd saves on this rank for ``count`` micro-batches of four samples each."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    found = cut(model, torch.zeros(4, 32), 2, Plan(split=["2"]))
    mine = group.place.stage
    pipeline = Pipeline(group, {mine: stage_of(model, found, mine)}, found, schedule, count)
    live = _Live({p.data_ptr() for p in model.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(live.pack, _Saved.unpack):
        pipeline.forward_backward(nn.functional.mse_loss, torch.ones(4 * count, 32), torch.ones(4 * count, 8))
    return live.most


class _Saved:
    def __init__(self, live: _Live, tensor: torch.Tensor) -> None:
        self.live, self.tensor = live, tensor
        self.size = tensor.numel() * tensor.element_size()
        live.now += self.size
        live.most = max(live.most, live.now)

    def __del__(self) -> None:
        self.live.now -= self.size

    def unpack(self) -> torch.Tensor:
        return self.tensor


class _Live:
    """Bytes of activations that autograd keeps, and the most that there were."""

    def __init__(self, weights: set[int]) -> None:
        self.now = self.most = 0
        self._weights = weights

    def pack(self, tensor: torch.Tensor) -> _Saved:
        # Weights are there whether they are saved or not; what is saved is not to hold the graph that saves it.
        saved = _Saved(self, tensor.detach())
        if tensor.data_ptr() in self._weights:
            self.now -= saved.size
            saved.size = 0
        return saved
