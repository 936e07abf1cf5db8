"""Trains until a file is there, with steps that sleep rather than compute, and notes when each step was done, as
``steps.py`` does: so that more workers than cores can be compared with fewer."""

from __future__ import annotations

import argparse
import os
import time
from array import array
from pathlib import Path

import torch
from torch import nn

import downpour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, required=True, help="sleep in each step")
    parser.add_argument("--notes", type=Path, required=True, help="the folder for the times")
    parser.add_argument("--until", required=True, help="train until this file is there")
    args = parser.parse_args()
    with open(args.notes / f"{downpour.rank()}-{os.getpid()}", "wb", buffering=0) as notes:
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        x = torch.randn(8, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model, optimizer = downpour.prepare(model, optimizer)
        notes.write(array("d", [time.monotonic()]))
        while not os.path.exists(args.until):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            time.sleep(args.step_ms / 1000)
            optimizer.step()
            notes.write(array("d", [time.monotonic()]))


if __name__ == "__main__":
    main()
