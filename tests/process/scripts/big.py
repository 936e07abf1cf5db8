"""A model of 8 MB. Fills the disk that FOLDER is on after its first step, then goes on training and logging."""

import sys
from pathlib import Path

import torch
from torch import nn

import downpour

ROWS = 2000


def fill(folder: Path) -> None:
    try:
        with (folder / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
    except OSError as error:
        print(f"disk is full: {error.strerror}")


def main() -> None:
    model = nn.Linear(1000, 2000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer = downpour.prepare(model, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 1000)).mean().backward()
        optimizer.step()
        if step == 0:
            fill(Path(sys.argv[1]))
            for row in range(ROWS):
                downpour.log(row=row)
    print("trained to the end")


main()
