"""Facts about the machine and the versions in use, for the record."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import zmq

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Machine:
    """Where and with what a benchmark ran."""

    cpu_model: str
    cores: int  # that this process may use
    kernel: str
    python: str
    torch: str
    libzmq: str
    pyzmq: str
    numpy: str
    load_average_1min: float  # before the start; what else went on


def look() -> Machine:
    return Machine(
        cpu_model=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        python=platform.python_version(),
        torch=version("torch"),
        libzmq=zmq.zmq_version(),
        pyzmq=zmq.pyzmq_version(),
        numpy=version("numpy"),
        load_average_1min=os.getloadavg()[0],
    )


def use_one_thread() -> None:
    """For this process and all that it starts; call before numpy or torch is imported."""
    os.environ.update(ONE_THREAD)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
