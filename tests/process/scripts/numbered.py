"""Trains in known steps, numbers its lines of output and its rows of metrics.

    numbered.py FOLDER [--steps N] [--gate N] [--crash RANK,STEP] [--deaf] [--child] [--slow S] [--until-go]

``--gate N``: after step N each rank makes FOLDER/reached-RANK and waits for FOLDER/go; after step N + 5 it makes
FOLDER/past-RANK. ``--crash``: this rank raises there. ``--deaf``: SIGTERM is ignored. ``--child``: start a process.
``--slow``: seconds to wait after each step. ``--until-go``: end when FOLDER/go is there. A pass has 480 samples in
batches of 4.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--gate", type=int, default=-1)
parser.add_argument("--crash", default="-1,-1")
parser.add_argument("--deaf", action="store_true")
parser.add_argument("--child", action="store_true")
parser.add_argument("--until-go", action="store_true")
parser.add_argument("--slow", type=float, default=0.0)


def main() -> None:
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.child:
        subprocess.Popen([sys.executable, "-c", "import time\nwhile True: time.sleep(60)"])
    crash = [int(n) for n in args.crash.split(",")]
    torch.manual_seed(3)
    inputs = torch.randn(480, 6)
    data = TensorDataset(inputs, inputs.square().sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    rank, step = downpour.rank(), downpour.clock()
    print(f"rank {rank} begins at step {step}", flush=True)
    while step < args.steps:
        for x, y in loader:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"line {step} of rank {rank}", flush=True)
            downpour.log(loss=loss.item(), step=step)
            if [rank, step] == crash:
                print("an unterminated last line", end="", flush=True)
                raise RuntimeError("the cat sat on the keyboard")
            if step == args.gate:
                (args.folder / f"reached-{rank}").touch()
                while not (args.folder / "go").exists():
                    time.sleep(0.02)
            if step == args.gate + 5:
                (args.folder / f"past-{rank}").touch()
            time.sleep(args.slow)
            if step >= args.steps or (args.until_go and (args.folder / "go").exists()):
                step = args.steps
                break
    print(f"rank {rank} is done", flush=True)


main()
