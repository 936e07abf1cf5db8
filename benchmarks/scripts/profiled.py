"""The training loop of ``train.py``, with its parts timed by ``profile_hook/step_recorder.py``. For ``profile.py``."""

from __future__ import annotations

import argparse
import time

import torch.nn.functional as F
from step_recorder import recorder  # on the path of the job that is profiled
from train import make_model, make_optimizer

import downpour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--optimizer", required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    model, batches = make_model(args.model)
    optimizer = make_optimizer(args.optimizer, model)
    model, optimizer = downpour.prepare(model, optimizer)
    for number in range(args.steps):
        recorder.steps.append(time.monotonic())
        x, y = batches[number % len(batches)]
        with recorder.phase("zero gradients"):
            optimizer.zero_grad()
        with recorder.phase("forward"):
            loss = F.cross_entropy(model(x), y)
        with recorder.phase("backward"):
            loss.backward()
        optimizer.step()
    recorder.steps.append(time.monotonic())


if __name__ == "__main__":
    main()
