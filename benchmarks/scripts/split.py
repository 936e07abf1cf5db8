"""A training loop for replicas of one worker or of several: ``--steps`` of them, or turns at the benchmark's gate.

Data is made up and fixed. All ranks of a replica take part in every turn.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import gate
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import downpour

BATCHES = 16
TOKENS, LENGTH, WIDTH, BLOCKS = 1024, 64, 384, 6


class Transformer(nn.Module):
    """A stack of blocks that predicts a token at each of 64 places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        block = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.embedding(tokens) + self.position))
        return found.transpose(1, 2)


def make(kind: str) -> tuple[nn.Module, DataLoader[tuple[Tensor, ...]]]:
    """The model and its batches."""
    torch.manual_seed(0)
    if kind == "transformer":
        batch = 16
        tokens = torch.randint(TOKENS, (BATCHES * batch, LENGTH))
        return Transformer(), DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), batch_size=batch)
    batch, width = 64, 2048  # as scripts/train.py has it
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(width, width), nn.ReLU())][:-1])
    data = TensorDataset(torch.randn(BATCHES * batch, width), torch.randint(width, (BATCHES * batch,)))
    return model, DataLoader(data, batch_size=batch)


def passes(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Batches without end."""
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("mlp25m", "transformer"), required=True)
    parser.add_argument("--steps", type=int, help="do so many and end")
    args = parser.parse_args()
    model, loader = make(args.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    criterion = nn.CrossEntropyLoss()
    batches = passes(loader)

    def step() -> Tensor:
        x, y = next(batches)
        optimizer.zero_grad()
        loss = downpour.forward_backward(model, criterion, x, y)
        optimizer.step()
        return loss

    if args.steps is not None:
        for _ in range(args.steps):
            step()
        return
    for turn in gate.turns(os.getpid()):  # downpour.rank() is the replica's number
        for _ in range(turn.warm):
            step()
        turn.begin()
        for _ in range(turn.steps):
            loss = step()
        turn.end()
        turn.report(loss.item())


if __name__ == "__main__":
    main()
