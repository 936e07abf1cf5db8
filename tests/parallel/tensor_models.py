"""Models that the tests of tensor parallelism split, with their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from downpour.parallel.branches import Branches


class Gated(nn.Module):
    """A perceptron block whose two layers are multiplied."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, size)
        self.w3 = nn.Linear(size, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.w2(F.silu(self.w1(x)) * self.w3(x))


class Residual(nn.Module):
    """Two convolutions and a skip, with batch norm, as in a ResNet."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(size, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, size, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A CNN with skips, a grouped stack, a flatten, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(Residual(12, 24), Residual(12, 18))
        self.narrow = nn.Sequential(
            nn.Conv2d(12, 24, 1), nn.GroupNorm(6, 24), nn.ReLU(inplace=True), nn.Conv2d(24, 24, 3, groups=24)
        )
        self.mix = nn.Conv2d(24, 12, 1)
        self.last = nn.Conv2d(12, 12, 3)
        self.head = nn.Sequential(nn.Linear(12 * 4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        x = self.mix(F.relu(self.narrow(x)))
        x = F.max_pool2d(torch.tanh(self.last(x)), 2)
        return self.head(x.view(x.size(0), -1))


class Encoder(nn.Module):
    """A transformer encoder with an embedding, a causal mask and a tied head, whose forward cannot be traced."""

    def __init__(self, tied: bool, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 24)
        self.places = nn.Parameter(torch.randn(7, 24) * 0.1)
        layer = nn.TransformerEncoderLayer(24, 6, 30, dropout, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(24, 24)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.places
        if float(x.detach().sum()) == 1e9:
            return x
        mask = nn.Transformer.generate_square_subsequent_mask(7)
        out: torch.Tensor = self.head(self.encoder(x, mask=mask, is_causal=True))
        return out


class Attends(nn.Module):
    """``nn.MultiheadAttention`` across two sequences, with masks, dropout, and its weights used."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.MultiheadAttention(12, 6, 0.3, kdim=8, vdim=10)
        self.itself = nn.MultiheadAttention(12, 4, batch_first=True, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys, values = x[..., :8], x[..., 2:]
        hidden = torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool)
        hidden[:, -1] = True
        mask = torch.zeros(6 * x.shape[1], x.shape[0], x.shape[0], dtype=torch.bool)
        mask[::5, 1, 2] = True
        y, weights = self.across(x, keys, values, key_padding_mask=hidden, attn_mask=mask)
        z, _ = self.itself(y, y, y, need_weights=False)
        return z + weights.mean()


class Inception(nn.Module):
    """Branches of unequal size, two of which drop out, and some that are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.mixed = Branches(
            [
                nn.Conv2d(8, 4, 1),
                nn.Sequential(
                    nn.Conv2d(8, 6, 1), nn.Dropout(0.3), nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
                ),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 5, 1), nn.Dropout2d(0.2)),
            ]
        )
        self.drop = nn.Dropout(0.1)
        self.summed = Branches([nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3, bias=False)], "sum")
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu(self.mixed(self.stem(x))))
        return self.head(self.summed(x).mean((2, 3)))


def perceptron() -> nn.Module:
    layers = (nn.Linear(9, 24), nn.ReLU(), nn.Dropout(0.25), nn.Linear(24, 13), nn.Tanh(), nn.Linear(13, 13), nn.GELU())
    return nn.Sequential(*layers, Gated(13, 12), nn.Linear(13, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "perceptron": (perceptron, lambda: torch.randn(5, 9)),
    "convolutions": (Net, lambda: torch.randn(4, 3, 8, 8)),
    "encoder": (lambda: Encoder(False, 0.1), lambda: torch.randint(24, (3, 7))),
    "tied": (lambda: Encoder(True, 0.0), lambda: torch.randint(24, (3, 7))),
    "attention": (Attends, lambda: torch.randn(5, 3, 12)),
    "branches": (Inception, lambda: torch.randn(4, 3, 7, 7)),
}
