"""Peer: one all-reduce of the payload by gloo between two processes, as in synchronous training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from bench_lib.child import RunOnce, Tell
from bench_lib.contender import ContenderError, Spec
from bench_lib.crew import Crew
from bench_lib.loopback import use_loopback

WORLD_SIZE = 2


class GlooContender:
    """Two ranks, one process each."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name = name
        self._spec = spec
        self._crew = Crew(name, spec.timeout_s)

    def start(self) -> None:
        common = (self._spec.floats, self._spec.timeout_s)
        self._crew.spawn("rank0", gloo_worker, 0, 0, *common)
        port = int(self._crew.hear("rank0"))
        self._crew.spawn("rank1", gloo_worker, 1, port, *common)
        self._crew.await_ready()

    def run_once(self) -> float:
        """The longer of the two ranks' times: the all-reduce is done when both have the sum."""
        return max(self._crew.run_once().values())

    def close(self) -> None:
        self._crew.close()


@contextmanager
def gloo_worker(tell: Tell, rank: int, port: int, floats: int, timeout_s: float) -> Iterator[RunOnce]:
    """Rank 0 hosts the store on a port that the system picks, and tells it; each run starts at a barrier."""
    use_loopback()
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    if rank == 0:
        tell(str(store.port))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    try:
        gradient = torch.empty(floats)

        def run_once() -> float:
            gradient.fill_(rank + 1.0)
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(gradient)
            took_s = time.perf_counter() - start
            if not gradient[0].item() == gradient[-1].item() == 3.0:  # 1 from rank 0 and 2 from rank 1
                raise ContenderError(f"wrong sum: {gradient}")
            return took_s

        yield run_once
    finally:
        distributed.destroy_process_group()
