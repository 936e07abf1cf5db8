"""Which worker trained which sample, in which step? Told twice: by notes, and by the weights themselves.

    census.py FOLDER [--passes N] [--samples N] [--rows N] [--pause-ms MS]

FOLDER/census-SLOT.txt has a line ``begun pass clock id id …`` for each step before it is made, and ``done …`` with the
same once it is completed; ``clock`` is the step's. A process may die between an update and what it would have noted of
it, so that only the first line tells of all steps; one that had to be computed again is noted again.

Each of ``--rows`` parameters (give the number of shards: one lies on each) has an entry for every sample of every pass,
and a step adds to the entries of its samples 1 through their number: SGD with rate 1. In ``sync`` the entries of a
round so become 1 through the number of all its samples.
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
parser.add_argument("--rows", type=int, default=1)
parser.add_argument("--pause-ms", type=float, default=2.0)


def main() -> None:
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    slot = int(json.loads(os.environ["DOWNPOUR_WORKER"])["slot"])
    torch.manual_seed(5)
    data = TensorDataset(torch.arange(args.samples))
    model = nn.ParameterList([nn.Parameter(torch.zeros(args.passes * args.samples)) for _ in range(args.rows)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    notes = os.open(args.folder / f"census-{slot}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(downpour.epoch(), args.passes):
        for (ids,) in loader:
            note = f"{number} {downpour.clock()} {' '.join(map(str, ids.tolist()))}\n"
            os.write(notes, f"begun {note}".encode())
            optimizer.zero_grad()
            (-sum(row[number * args.samples + ids].mean() for row in model)).backward()
            optimizer.step()
            os.write(notes, f"done {note}".encode())
            time.sleep(args.pause_ms / 1e3)


main()
