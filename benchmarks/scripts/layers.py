"""A chain of linear layers as a job with ``fetch=layers`` would train it, and as one that has room for all of it.

Writes what it has found out about itself to ``--report`` as JSON: seconds of the median step, and bytes that were
resident before the model was made and at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import downpour


def resident(field: str) -> int:
    """A field of this process' status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--meta", action="store_true")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(downpour.rank())
    x = torch.randn(args.batch, args.width)
    nn.Linear(args.width, 8)(x).sum().backward()  # what torch takes for itself
    before = resident("VmRSS:")
    with torch.device("meta" if args.meta else "cpu"):
        layers = [layer for _ in range(args.depth) for layer in (nn.Linear(args.width, args.width), nn.ReLU())]
        model: nn.Module = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model, optimizer = downpour.prepare(model, optimizer)
    times = []
    for _ in range(args.steps + 2):
        started_s = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - started_s)
    if downpour.is_chief():
        found = {"step_s": statistics.median(times[2:]), "before": before, "peak": resident("VmHWM:")}
        args.report.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
