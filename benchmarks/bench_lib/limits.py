"""What one process can do at best: copying memory, and optimizer steps. One child each, one thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from bench_lib.child import RunOnce, Tell, Worker
from bench_lib.contender import Spec
from bench_lib.crew import Crew

Rule = Literal["sgd", "adam"]


class SoloContender:
    """A contender made of one child that times itself."""

    def __init__(self, name: str, spec: Spec, worker: Worker, *arguments: object) -> None:
        self.name = name
        self._crew = Crew(name, spec.timeout_s)
        self._worker = worker
        self._arguments = arguments

    def start(self) -> None:
        self._crew.spawn("solo", self._worker, *self._arguments)
        self._crew.await_ready()

    def run_once(self) -> float:
        return self._crew.run_once()["solo"]

    def close(self) -> None:
        self._crew.close()


def memcpy(name: str, spec: Spec, copies: int) -> SoloContender:
    """Copy the payload `copies` times, between buffers that are mapped already."""
    return SoloContender(name, spec, copy_worker, spec.floats, copies)


def optimizer(name: str, spec: Spec, rule: Rule) -> SoloContender:
    """One fused step of torch's optimizer over one tensor of the payload's size."""
    return SoloContender(name, spec, optimizer_worker, spec.floats, rule)


@contextmanager
def copy_worker(_tell: Tell, floats: int, copies: int) -> Iterator[RunOnce]:
    """`copies` copies in a chain, as data passes from buffer to buffer."""
    buffers = [np.full(floats, index, dtype=np.float32) for index in range(copies + 1)]

    def run_once() -> float:
        buffers[0][0] += 1.0
        start = time.perf_counter()
        for source, target in itertools.pairwise(buffers):
            np.copyto(target, source)
        took_s = time.perf_counter() - start
        assert buffers[-1][0] == buffers[0][0]
        return took_s

    yield run_once


@contextmanager
def optimizer_worker(_tell: Tell, floats: int, rule: Rule) -> Iterator[RunOnce]:
    """Weights, gradient and state stay in place; only `step()` is timed."""
    torch.set_num_threads(1)
    weights = torch.nn.Parameter(torch.zeros(floats))
    weights.grad = torch.full((floats,), 0.5)
    stepper: torch.optim.Optimizer
    match rule:
        case "sgd":
            stepper = torch.optim.SGD([weights], lr=0.01, fused=True)
        case "adam":
            stepper = torch.optim.Adam([weights], lr=0.001, fused=True)

    def run_once() -> float:
        before = weights[-1].item()
        start = time.perf_counter()
        stepper.step()
        took_s = time.perf_counter() - start
        assert weights[-1].item() < before
        return took_s

    yield run_once
