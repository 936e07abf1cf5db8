"""A small training with everything random that a step may have; prints each step's clock. Argument: epochs."""

import sys
import time

import torch
from torch import nn

import downpour


def main() -> None:
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    print(f"begins at clock {downpour.clock()}", flush=True)
    for _ in range(downpour.epoch(), int(sys.argv[1])):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(0.005)
            print(f"clock {downpour.clock()}", flush=True)


main()
