"""Fails on rank 1 in the way its argument names."""

import os
import signal
import subprocess
import sys

import torch
from torch import nn

import downpour


def fail(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if way == "raise":
        raise RuntimeError("the cat sat on the keyboard")
    if way == "kill":
        subprocess.Popen(["sleep", "600"])
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "nan":
        model[1].bias.grad.fill_(float("nan"))
        optimizer.step()


def main() -> None:
    way = sys.argv[1]
    if way == "unprepared":
        print("trains alone")
        return
    width = 5 if way == "differs" and downpour.rank() == 1 else 4
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer = downpour.prepare(model, optimizer)
    while True:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()  # converges: only what fails on purpose does
        if downpour.rank() == 1 and downpour.clock() == 3:
            fail(way, model, optimizer)
        optimizer.step()


main()
