"""Trains until a file is there, and notes when each step was done: eight bytes a step into a file of this process.

The file's name is the worker's slot and process id. It holds times of CLOCK_MONOTONIC, which all processes share, in
seconds as native doubles: the first when the worker had joined (``prepare`` returned), then one after each step.
"""

from __future__ import annotations

import argparse
import os
import time
from array import array
from pathlib import Path

import torch.nn.functional as F
from train import make_model, make_optimizer

import downpour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("mlp25m", "digits", "tiny"), required=True)
    parser.add_argument("--optimizer", choices=("sgd", "adam"), required=True)
    parser.add_argument("--notes", type=Path, required=True, help="the folder for the times")
    parser.add_argument("--until", required=True, help="train until this file is there")
    args = parser.parse_args()
    with open(args.notes / f"{downpour.rank()}-{os.getpid()}", "wb", buffering=0) as notes:
        model, batches = make_model(args.model)
        optimizer = make_optimizer(args.optimizer, model)
        model, optimizer = downpour.prepare(model, optimizer)
        notes.write(array("d", [time.monotonic()]))
        done = 0
        while not os.path.exists(args.until):
            x, y = batches[done % len(batches)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
            notes.write(array("d", [time.monotonic()]))


if __name__ == "__main__":
    main()
