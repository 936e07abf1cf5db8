"""A script for `downpour tune`; its argument names what it does."""

import pathlib
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour


def main() -> None:
    way = sys.argv[1]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(torch.ones(40, 4)), batch_size=16)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    try:
        for epoch in range(3):
            for (x,) in loader:
                if way == "hangs":
                    pathlib.Path("there").write_text("")
                    signal.pause()
                if way == "memory" and len(x) > 8:
                    torch.empty(1 << 55)
                optimizer.zero_grad()
                model(x).square().mean().backward()
                if way != "never":
                    optimizer.step()
            print("pass", epoch)
    finally:
        pathlib.Path("tidied").write_text(way)


main()
