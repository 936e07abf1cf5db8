"""The ranks of one replica as processes of a test, without any server."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from downpour.parallel.group import Group, Place

DEADLINE_S = 100.0


def run_ranks(body: Callable[..., Any], widths: tuple[int, ...], *arguments: Any) -> list[Any]:
    """Call ``body(group, *arguments)`` in ``sum(widths)`` processes; what each returns, by rank.

    They return plain values and numpy arrays. ``body`` is a function of a module. Raises ``AssertionError`` with
    the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context("spawn")
    ranks = sum(widths)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_rank, args=(body, rank, widths, f"{folder}/store", pipes[rank][1], arguments))
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            found = []
            for rank, (receiver, _) in enumerate(pipes):
                assert receiver.poll(DEADLINE_S), f"rank {rank} says nothing"
                found.append(receiver.recv())
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()
            for receiver, sender in pipes:
                receiver.close()
                sender.close()
    failed = [value for well, value in found if not well]
    assert not failed, failed[0]
    return [value for _, value in found]


def _rank(
    body: Callable[..., Any], rank: int, widths: tuple[int, ...], store: str, sender: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    group = Group(Place(rank, widths), FileStore(store, sum(widths)), torch.device("cpu"), DEADLINE_S)
    try:
        sender.send((True, body(group, *arguments)))
    except BaseException:
        sender.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        group.close()
