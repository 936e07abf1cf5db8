"""The models that are split in tests: small, and without anything random after they are made."""

from __future__ import annotations

import torch
from torch import nn

STEPS = 20
SAMPLES = 320


class Residual(nn.Module):
    """A CNN with skips, one of them over most of the net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.down1 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(16, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.stem(x))
        half = torch.relu(self.down1(first))
        deep = torch.relu(self.down2(half))
        deep = torch.relu(self.middle(deep)) + half
        wide = torch.relu(self.up(deep))
        joined = torch.cat([wide, first], dim=1)
        found: torch.Tensor = self.head(torch.flatten(torch.relu(self.out(joined)), 1))
        return found


class Transformer(nn.Module):
    """Classifies sequences of 16 tokens; its pixels are its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.position = nn.Parameter(torch.randn(16, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))
        return found


class Tied(Transformer):
    """Whose head has the weights of its embedding: in a pipeline the first and the last stage hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 32, bias=False)
        self.head.weight = self.embedding.weight


def make(kind: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model, and 320 samples with their labels; the same at every call."""
    torch.manual_seed(7)
    labels = torch.randint(0, 10, (SAMPLES,))
    if kind == "cnn":
        return Residual(), torch.randn(SAMPLES, 1, 8, 8), labels
    if kind in ("transformer", "tied"):
        return Transformer() if kind == "transformer" else Tied(), torch.randint(0, 32, (SAMPLES, 16)), labels
    mlp = nn.Sequential(
        *(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    )
    return mlp, torch.randn(SAMPLES, 64), labels


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """With an ``eps`` above rounding: the gradient of attention's key bias is zero but for that, and AdamW's usual one
    would make steps of it."""
    return torch.optim.AdamW([{"params": model.parameters(), "lr": 2e-3}], weight_decay=0.01, eps=1e-4)
