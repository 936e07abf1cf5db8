"""A small net on scikit-learn's digits with plain SGD, for a given number of steps; the chief prints the final loss.

The loss is the mean cross-entropy over all 1,797 images. All follows from the seed and the worker's rank.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import nn

import downpour


def main() -> None:
    """Train, then say how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=32, help="0: softmax regression")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000, help="of all workers together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = load_digits()
    samples, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(args.seed)
    layers = [nn.Linear(64, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 10)] if args.hidden else [nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    model, optimizer = downpour.prepare(model, optimizer)
    drawn = torch.Generator().manual_seed(1000 * args.seed + downpour.rank())
    downpour.barrier()
    for _ in range(args.steps // downpour.world_size()):
        batch = torch.randint(len(labels), (args.batch,), generator=drawn)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(samples[batch]), labels[batch]).backward()
        optimizer.step()
    downpour.barrier()
    downpour.pull()
    if downpour.is_chief():
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(samples), labels).item()
        print(f"final loss {loss:.6g}", flush=True)


if __name__ == "__main__":
    main()
