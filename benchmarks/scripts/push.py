"""A worker whose model is one vector and whose gradient is always one: what a push and a pull cost by themselves.

Tasks: ``step`` pushes and pulls in one ``optimizer.step()``, ``push`` is ``downpour.push()``, ``loops`` only waits.
With ``busy-`` before them, a second thread runs pure Python meanwhile, and the value reported is its loops a second.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import gate
import torch
from torch import nn

import downpour

LR = 1e-3
LOOPS = 1000
LOOPS_WAIT_S = 0.2


class Busy(threading.Thread):
    """Pure Python for as long as the block lasts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = False
        self._loops = 0
        self.per_s = 0.0

    def run(self) -> None:
        while not self._over:
            for _ in range(LOOPS):
                pass
            self._loops += LOOPS

    def __enter__(self) -> Busy:
        self.start()
        self._begun_s = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.per_s = self._loops / (time.monotonic() - self._begun_s)
        self._over = True
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, required=True, help="of gradient, in 10^6 bytes")
    args = parser.parse_args()
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(args.mb * 10**6 // 4))})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model, optimizer = downpour.prepare(model, optimizer)
    weights = model["w"]
    if weights.grad is None:
        weights.grad = torch.zeros_like(weights)
    weights.grad.fill_(1.0)
    applied = 0

    def step() -> None:
        nonlocal applied
        optimizer.step()
        applied += 1

    def push() -> None:
        nonlocal applied
        downpour.push()
        applied += 1

    tasks: dict[str, Callable[[], None]] = {
        "step": step,
        "push": push,
        "loops": lambda: time.sleep(LOOPS_WAIT_S),
    }
    for turn in gate.turns(downpour.rank()):
        do = tasks[turn.task.removeprefix("busy-")]
        for _ in range(turn.warm):
            do()
        value = 0.0
        if turn.task.startswith("busy-"):
            with Busy() as busy:
                turn.begin()
                for _ in range(turn.steps):
                    do()
                turn.end()
            value = busy.per_s
        else:
            turn.begin()
            for _ in range(turn.steps):
                do()
            turn.end()
        downpour.pull()
        for weight in (weights[0].item(), weights[-1].item()):
            if abs(weight + LR * applied) > 1e-3 * LR * applied:
                raise SystemExit(f"wrong weights after {applied} updates: {weight}")
        turn.report(value)


if __name__ == "__main__":
    main()
