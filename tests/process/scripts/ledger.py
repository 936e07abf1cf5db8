"""Every step adds exactly 1 to every weight, so that the weights count the updates. Arguments:

``--steps N``: end after N steps (default: only when killed). ``--slow``: 10 ms per step. ``--deaf``: ignore SIGTERM.
"""

import signal
import sys
import time

import torch
from torch import nn

import downpour


def main() -> None:
    steps = int(sys.argv[sys.argv.index("--steps") + 1]) if "--steps" in sys.argv else 1 << 60
    if "--deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    model = nn.Linear(9, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = downpour.prepare(model, optimizer)
    first = downpour.clock()
    print(f"starts at clock {first} with weights {model.weight.flatten().tolist()}")
    while downpour.clock() - first < steps:
        optimizer.zero_grad()
        (-model.weight.sum()).backward()
        optimizer.step()
        if "--slow" in sys.argv:
            time.sleep(0.01)
        if downpour.clock() - first == 5:
            print("is training")
    print(f"ends at clock {downpour.clock()}")


main()
