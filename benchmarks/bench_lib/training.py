"""Contenders of the training benchmark: who trains, how many, and how they are started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from bench_lib.contender import Group
from bench_lib.local_job import SCRIPTS, GatedPrograms

Optimizer = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Workload:
    """A model with its optimizer, and how much of it is a turn."""

    name: str
    model: str
    optimizer: Optimizer
    batch: int
    """samples per step of one worker"""
    steps: int
    """timed steps per worker and turn"""
    warm: int
    """steps before those in every turn, not timed"""


WORKLOADS = [
    Workload("mlp25m-sgd", "mlp25m", "sgd", batch=64, steps=10, warm=1),
    Workload("mlp25m-adam", "mlp25m", "adam", batch=64, steps=10, warm=1),
    Workload("digits-adam", "digits", "adam", batch=32, steps=300, warm=20),
    Workload("tiny-adam", "tiny", "adam", batch=8, steps=5, warm=1),  # for tests of the benchmark
]


@dataclass(frozen=True)
class Trainer:
    """How a contender is started: ``downpour run`` with these options, or else processes of its own."""

    name: str
    group: Group
    workers: int
    options: tuple[str, ...] | None = None
    """of ``downpour run``, after ``-w``"""
    ddp: bool = False
    optimizer: str | None = None
    """instead of the workload's"""
    only_for: Optimizer | None = None


def _ours(name: str, workers: int, *options: str) -> Trainer:
    return Trainer(name, "ours", workers, options)


TRAINERS = [
    Trainer("plain", "limit", 1),
    Trainer("plain-fused", "limit", 1, optimizer="adam-fused", only_for="adam"),
    Trainer("two-plain", "limit", 2),
    Trainer("ddp-gloo", "peer", 2, ddp=True),
    _ours("downpour-1", 1),
    _ours("downpour-async-2", 2),
    _ours("downpour-async-2-2s", 2, "-s", "2"),
    _ours("downpour-ahead-2", 2, "--set", "fetch_ahead=true"),
    _ours("downpour-ssp-2", 2, "--mode", "ssp:2"),
    _ours("downpour-sync-2", 2, "--mode", "sync"),
    _ours("downpour-sync-2-2s", 2, "--mode", "sync", "-s", "2"),
    _ours("downpour-tcp-async-2", 2, "--set", "transport=tcp"),
    _ours("downpour-tcp-sync-2", 2, "--mode", "sync", "--set", "transport=tcp"),
]


def trainers_for(workload: Workload) -> list[Trainer]:
    """Those that make sense for it."""
    return [trainer for trainer in TRAINERS if trainer.only_for in (None, workload.optimizer)]


class TrainingContender:
    """Processes that train, each at the gate between turns."""

    def __init__(self, trainer: Trainer, workload: Workload, timeout_s: float) -> None:
        self.name = trainer.name
        self._trainer = trainer
        self._workload = workload
        self.programs = GatedPrograms(trainer.name, trainer.workers, timeout_s)

    def start(self) -> None:
        """Start everything and wait until all workers are at the gate. Raises :class:`ContenderError`."""
        trainer, workload = self._trainer, self._workload
        script = [str(SCRIPTS / "train.py"), "--model", workload.model]
        script += ["--optimizer", trainer.optimizer or workload.optimizer]
        if trainer.options is not None:
            self.programs.add_job(["-w", str(trainer.workers), *trainer.options], script)
        else:
            environment: dict[str, str] = {}
            if trainer.ddp:
                script += ["--ddp", "--store", os.path.join(self.programs.folder, "store")]
                environment |= {"GLOO_SOCKET_IFNAME": "lo"}
            if trainer.workers > 1:
                environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(trainer.workers)}
            for rank in range(trainer.workers):
                self.programs.add(script, {**environment, "RANK": str(rank)})
        self.programs.await_ready()

    def run_once(self) -> float:
        """One turn; seconds from the first worker's first timed step to the last worker's last."""
        return self.programs.turn(self._workload.warm, self._workload.steps).seconds

    def close(self) -> None:
        """End the scripts and with them the jobs."""
        self.programs.close()
