"""What the servers cost a step on a GPU: a plain loop, then the same loop with one worker and one shard.

Run it by itself for the plain loop and under ``downpour run -w 1 -s N benchmarks/gpu_step.py`` for ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import nn

import downpour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048, help="width of the MLP's six layers")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = downpour.device()
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(args.width, args.width), nn.ReLU()]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model, optimizer = downpour.prepare(model, optimizer)
    x = torch.randn(args.batch, args.width, device=device)
    times = []
    for _ in range(args.steps + 5):
        started_s = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    parameters = sum(p.numel() for p in model.parameters())
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "workers": downpour.world_size(),
        "megabytes": round(parameters * 4 / 1e6, 1),
        "median_step_ms": round(statistics.median(times[5:]) * 1e3, 3),
        "min_step_ms": round(min(times[5:]) * 1e3, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
