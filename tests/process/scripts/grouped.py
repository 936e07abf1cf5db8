"""A training in replicas of several ranks: grouped.py WAY STEPS. Each rank prints the clock after each step.

``until``: it ends soon after a replica has been started again, and each replica by its lead's word alone, which comes
with a batch. ``raise N``: the worker in slot N raises in its fifth step. ``steps``: nothing of that.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import downpour

WAY, NUMBER = sys.argv[1], int(sys.argv[2])
BACK = Path("back")


def collate(rows: list[Any]) -> list[Any]:
    time.sleep(0.01)
    return [*default_collate(rows), BACK.exists()]


def main() -> None:
    me = json.loads(os.environ["DOWNPOUR_WORKER"])
    slot, epoch = me["slot"], me["worker_epoch"]
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    criterion = nn.CrossEntropyLoss()
    print(f"begins at clock {downpour.clock()}", flush=True)
    steps = 0
    while True:
        for x, y, ends in loader:
            optimizer.zero_grad()
            loss = downpour.forward_backward(model, criterion, x, y)
            optimizer.step()
            steps += 1
            print(f"clock {downpour.clock()} loss {float(loss):.6f}", flush=True)
            if WAY == "raise" and slot == NUMBER and steps == 5:
                raise RuntimeError("the cat sat on the keyboard")
            if WAY == "until" and epoch and steps == 3:
                BACK.touch()
            if ends or (WAY == "steps" and downpour.clock() == NUMBER) or downpour.should_stop():
                print("ends", flush=True)
                return


main()
