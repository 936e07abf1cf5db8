"""A full-batch problem on scikit-learn's digits, by ``downpour.minimize``; in one process without a launcher.

Writes the minimum and the seconds that it took to ``--report`` as JSON. Worker 1 may be ``--slow`` seconds late with
each batch, as on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import downpour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    bunch = load_digits()
    data = TensorDataset(torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target))
    torch.manual_seed(0)
    hidden: list[nn.Module] = [nn.Linear(64, args.hidden), nn.Tanh()] if args.hidden else []
    model: nn.Module = nn.Sequential(*hidden, nn.Linear(args.hidden or 64, 10))
    model, loader = downpour.prepare(model, DataLoader(data, batch_size=args.batch))

    def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if downpour.rank() == 1:
            time.sleep(args.slow)
        return cross_entropy(outputs, targets)

    downpour.barrier()
    started_s = time.perf_counter()
    found = downpour.minimize(model, criterion, loader, max_iterations=args.iterations, weight_decay=1e-3)
    took_s = time.perf_counter() - started_s
    if downpour.is_chief():
        args.report.write_text(json.dumps({**asdict(found), "took_s": took_s}), encoding="utf-8")


if __name__ == "__main__":
    main()
