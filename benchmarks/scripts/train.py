"""A training loop as anyone would write it: forward, backward, step. Contenders differ in how it is started.

By itself one plain process; with ``--ddp`` a rank of DistributedDataParallel over gloo (RANK and WORLD_SIZE in the
environment, ``--store`` a file to meet at); under ``downpour run`` a worker. The data is made up and fixed, each worker
has its own, and labels are random so that the gradient does not vanish however long the benchmark takes.
"""

from __future__ import annotations

import argparse
import os

import gate
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import downpour

BATCHES = 8


def own_rank() -> int:
    """Of this process among those that train together."""
    return int(os.environ.get("RANK", downpour.rank()))


def make_model(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model and its batches."""
    random = torch.Generator().manual_seed(1 + own_rank())
    torch.manual_seed(0)
    if name == "digits":  # as examples/digits_mlp.py has it
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        shape, classes = (32, 1, 8, 8), 10
    else:
        batch, width, depth = (64, 2048, 6) if name == "mlp25m" else (8, 16, 2)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        shape, classes = (batch, width), width
    batches = [
        (torch.randn(shape, generator=random), torch.randint(classes, shape[:1], generator=random))
        for _ in range(BATCHES)
    ]
    return model, batches


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    match name:
        case "sgd":
            return torch.optim.SGD(model.parameters(), lr=1e-3)
        case "adam":
            return torch.optim.Adam(model.parameters(), lr=1e-5)
        case "adam-fused":
            return torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    raise ValueError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("mlp25m", "digits", "tiny"), required=True)
    parser.add_argument("--optimizer", choices=("sgd", "adam", "adam-fused"), required=True)
    parser.add_argument("--ddp", action="store_true")
    parser.add_argument("--store")
    args = parser.parse_args()
    model, batches = make_model(args.model)
    rank = own_rank()
    if args.ddp:
        size = int(os.environ["WORLD_SIZE"])
        distributed.init_process_group("gloo", init_method=f"file://{args.store}", rank=rank, world_size=size)
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = make_optimizer(args.optimizer, model)
    model, optimizer = downpour.prepare(model, optimizer)
    done = 0

    def step() -> Tensor:
        nonlocal done
        x, y = batches[done % len(batches)]
        done += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    for turn in gate.turns(rank):
        for _ in range(turn.warm):
            step()
        turn.begin()
        for _ in range(turn.steps):
            loss = step()
        turn.end()
        turn.report(loss.item())
    if args.ddp:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
