"""Peer: a parameter server over torch.distributed.rpc, as in PyTorch's parameter-server tutorials.

The server holds the weights and an SGD optimizer; the trainer calls `update_and_fetch` with its gradient by
`rpc_sync` and gets the updated weights back. Library defaults, except for one torch thread per process.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import rpc

from bench_lib.child import RunOnce, Tell
from bench_lib.contender import ContenderError, Spec
from bench_lib.crew import STOP_GRACE_S, Crew
from bench_lib.loopback import use_loopback

SERVER, TRAINER = "server", "trainer"
RANKS = {SERVER: 0, TRAINER: 1}
LEARNING_RATE = 0.5
GRADIENT = 1.0


class RpcContender:
    """Server and trainer, one process each."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name = name
        self._spec = spec
        # Measured: TensorPipe's shared-memory transport polls without sleeping, one full core per process.
        self._crew = Crew(name, spec.timeout_s, park_when_idle=True)

    def start(self) -> None:
        port = _free_port()  # init_rpc takes an address only, so it cannot be told "any port" and asked which
        for role in RANKS:
            self._crew.spawn(role, rpc_worker, role, port, self._spec.floats, self._spec.timeout_s)
        self._crew.await_ready()

    def run_once(self) -> float:
        return self._crew.run_once()[TRAINER]

    def close(self) -> None:
        self._crew.close()


class ParameterServer:
    """Lives in the server process; the trainer holds a remote reference to it."""

    def __init__(self, floats: int) -> None:
        self.weights = torch.nn.Parameter(torch.zeros(floats))
        self.optimizer = torch.optim.SGD([self.weights], lr=LEARNING_RATE)

    def update(self, gradient: torch.Tensor) -> torch.Tensor:
        self.weights.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.weights.detach()


def update_and_fetch(server: rpc.RRef[ParameterServer], gradient: torch.Tensor) -> torch.Tensor:
    """Runs at the server: apply one gradient, return the new weights."""
    weights: torch.Tensor = server.local_value().update(gradient)
    return weights


@contextmanager
def rpc_worker(_tell: Tell, role: str, port: int, floats: int, timeout_s: float) -> Iterator[RunOnce]:
    """Joins the RPC group in this role; the trainer's run is one push and pull, the server's is nothing."""
    use_loopback()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="You are using a Backend")  # torch's own, at shutdown
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=timeout_s)
    rpc.init_rpc(role, rank=RANKS[role], world_size=len(RANKS), rpc_backend_options=options)
    graceful = False
    try:
        yield _trainer(floats) if role == TRAINER else lambda: 0.0
        graceful = True
    finally:
        rpc.shutdown(graceful=graceful, timeout=STOP_GRACE_S)  # graceful waits for the other one


def _trainer(floats: int) -> RunOnce:
    server = rpc.remote(SERVER, ParameterServer, args=(floats,))
    gradient = torch.full((floats,), GRADIENT)
    expected = 0.0

    def run_once() -> float:
        nonlocal expected
        expected -= LEARNING_RATE * GRADIENT
        start = time.perf_counter()
        weights = rpc.rpc_sync(server.owner(), update_and_fetch, args=(server, gradient))
        took_s = time.perf_counter() - start
        if weights.numel() != floats or not weights[0].item() == weights[-1].item() == expected:
            raise ContenderError(f"wrong weights came back: {weights}, expected {expected}")
        return took_s

    return run_once


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
