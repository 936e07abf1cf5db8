"""Peer: a parameter server as a Ray actor, as in Ray's own example, tuned as its documentation advises.

The actor has a core of its own and keeps its weights as one float32 array. Both directions go through Ray's object
store in shared memory: the driver puts the gradient there, the actor reads it without a copy, and the weights that it
returns are read without a copy too, then copied into the worker's own memory, as a training loop needs them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench_lib.child import RunOnce, Tell
from bench_lib.contender import ContenderError, Spec, UnavailableError
from bench_lib.crew import Crew

LEARNING_RATE = 0.5
GRADIENT = 1.0
STORE_PAYLOADS = 8  # objects that the store has room for; Ray frees them a little after their last reference
STORE_SPARE_BYTES = 200_000_000


class RayContender:
    """A driver, which starts Ray on this machine and nowhere else, and its actor."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name = name
        self._spec = spec
        self._crew = Crew(name, spec.timeout_s)
        self._folder = tempfile.mkdtemp(prefix="ray-bench-", dir="/tmp")  # its sockets need a short path

    def start(self) -> None:
        if find_spec("ray") is None:
            raise UnavailableError("Ray is not installed: pip install -e '.[bench]'")
        self._crew.spawn("driver", driver, self._folder, self._spec.floats, self._spec.timeout_s)
        self._crew.await_ready()

    def run_once(self) -> float:
        return self._crew.run_once()["driver"]

    def close(self) -> None:
        self._crew.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class ParameterServer:
    """Becomes the actor."""

    def __init__(self, floats: int) -> None:
        self._weights = np.zeros(floats, dtype=np.float32)
        self._change = np.empty(floats, dtype=np.float32)

    def update(self, gradient: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Apply one gradient, return the new weights."""
        np.multiply(gradient, LEARNING_RATE, out=self._change)
        self._weights -= self._change
        return self._weights


@contextmanager
def driver(_tell: Tell, folder: str, floats: int, timeout_s: float) -> Iterator[RunOnce]:
    """The training process; a run is one push and pull."""
    token = Path(folder) / "token"  # else Ray would leave one in the home directory
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=STORE_PAYLOADS * 4 * floats + STORE_SPARE_BYTES,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    try:
        actor: Any = ray.remote(num_cpus=1)(ParameterServer)
        server = actor.remote(floats)
        gradient = np.full(floats, GRADIENT, dtype=np.float32)
        weights = np.zeros(floats, dtype=np.float32)
        expected = 0.0

        def run_once() -> float:
            nonlocal expected
            expected -= LEARNING_RATE * GRADIENT
            start = time.perf_counter()
            answer = ray.get(server.update.remote(ray.put(gradient)), timeout=timeout_s)
            np.copyto(weights, answer)
            took_s = time.perf_counter() - start
            if not weights[0] == weights[-1] == expected:
                raise ContenderError(f"wrong weights came back: {weights}, expected {expected}")
            return took_s

        yield run_once
    finally:
        ray.shutdown()
