"""Which worker trained which sample, in which step? FOLDER/census-SLOT.txt has a line ``pass clock id id …`` for each
step that was completed; ``clock`` is the step's. A step that had to be computed again is noted again.

    census.py FOLDER [--passes N] [--samples N] [--pause-ms MS]
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--passes", type=int, default=3)
parser.add_argument("--samples", type=int, default=397)
parser.add_argument("--pause-ms", type=float, default=2.0)


def main() -> None:
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    slot = int(json.loads(os.environ["DOWNPOUR_WORKER"])["slot"])
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(args.samples, 5), torch.arange(args.samples))
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    notes = os.open(args.folder / f"census-{slot}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(downpour.epoch(), args.passes):
        for inputs, ids in loader:
            clock = downpour.clock()
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            os.write(notes, f"{number} {clock} {' '.join(map(str, ids.tolist()))}\n".encode())
            time.sleep(args.pause_ms / 1e3)


main()
