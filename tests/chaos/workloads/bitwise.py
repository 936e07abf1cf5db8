"""Small and quick, with what must not go astray: Adam, dropout, shuffled passes that do not divide evenly, and, with
``--norm``, BatchNorm's buffers. At the end each worker prints the SHA-256 of the weights that it has.

    bitwise.py [--passes N] [--samples N] [--norm] [--pause-ms MS] [--faulty]

``--faulty``: what it draws depends on the process, as a script must not do. Shows that the comparison sees it.
"""

import argparse
import hashlib
import os
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour

parser = argparse.ArgumentParser()
parser.add_argument("--passes", type=int, default=3)
parser.add_argument("--samples", type=int, default=397)
parser.add_argument("--norm", action="store_true")
parser.add_argument("--pause-ms", type=float, default=2.0)
parser.add_argument("--faulty", action="store_true")


def main() -> None:
    args = parser.parse_args()
    torch.manual_seed(5)
    inputs = torch.randn(args.samples, 6)
    data = TensorDataset(inputs, inputs.square().sum(1, keepdim=True))
    norm = [nn.BatchNorm1d(24)] if args.norm else []
    model = nn.Sequential(nn.Linear(6, 24), *norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=args.norm)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    print(f"begins at clock {downpour.clock()}, pass {downpour.epoch()}", flush=True)
    for _ in range(downpour.epoch(), args.passes):
        for x, y in loader:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            if args.faulty:
                loss = loss * (1.0 + os.getpid() % 97 / 1e6)
            loss.backward()
            optimizer.step()
            time.sleep(args.pause_ms / 1e3)
    downpour.pull()
    state = {name: tensor.detach().contiguous() for name, tensor in sorted(model.state_dict().items())}
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
    print(f"ends at clock {downpour.clock()} with weights {digest}", flush=True)


main()
