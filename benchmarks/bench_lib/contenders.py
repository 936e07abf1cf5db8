"""The registry: every contender, in the order of turns. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench_lib.contender import Contender, Entry, Spec

if TYPE_CHECKING:
    from bench_lib.ours import Way

REFERENCE = "zmq-ipc"  # what goodputs are compared with

COPY = "1x copy"
TWO_COPIES = "2x copies"
ONE_WAY = "1x one way"
STEP = "1x gradient"
PUSH_PULL = "2x push+pull"
ALL_REDUCE = "2x send+recv"


def registry() -> list[Entry]:
    """All contenders that this benchmark knows."""
    return [
        Entry("memcpy", "limit", 1, COPY, lambda name, spec: _memcpy(name, spec, copies=1)),
        Entry("memcpy-x2", "limit", 2, TWO_COPIES, lambda name, spec: _memcpy(name, spec, copies=2)),
        Entry(REFERENCE, "limit", 1, ONE_WAY, _zmq_ipc),
        Entry("zmq-tcp", "limit", 1, ONE_WAY, _zmq_tcp),
        Entry("sgd-fused", "limit", 1, STEP, _sgd),
        Entry("adam-fused", "limit", 1, STEP, _adam),
        Entry("torch-rpc-ps", "peer", 2, PUSH_PULL, _torch_rpc),
        Entry("gloo-allreduce", "peer", 2, ALL_REDUCE, _gloo),
        Entry("downpour", "ours", 2, PUSH_PULL, lambda name, spec: _ours(name, spec, "memory")),
        Entry("downpour-ipc", "ours", 2, PUSH_PULL, lambda name, spec: _ours(name, spec, "ipc")),
        Entry("downpour-tcp", "ours", 2, PUSH_PULL, lambda name, spec: _ours(name, spec, "tcp")),
        Entry("downpour-curve", "ours", 2, PUSH_PULL, lambda name, spec: _ours(name, spec, "curve")),
    ]


def _memcpy(name: str, spec: Spec, copies: int) -> Contender:
    from bench_lib.limits import memcpy

    return memcpy(name, spec, copies)


def _sgd(name: str, spec: Spec) -> Contender:
    from bench_lib.limits import optimizer

    return optimizer(name, spec, "sgd")


def _adam(name: str, spec: Spec) -> Contender:
    from bench_lib.limits import optimizer

    return optimizer(name, spec, "adam")


def _zmq_ipc(name: str, spec: Spec) -> Contender:
    from bench_lib.streams import StreamContender

    return StreamContender(name, spec, "ipc")


def _zmq_tcp(name: str, spec: Spec) -> Contender:
    from bench_lib.streams import StreamContender

    return StreamContender(name, spec, "tcp")


def _torch_rpc(name: str, spec: Spec) -> Contender:
    from bench_lib.peer_rpc import RpcContender

    return RpcContender(name, spec)


def _gloo(name: str, spec: Spec) -> Contender:
    from bench_lib.peer_gloo import GlooContender

    return GlooContender(name, spec)


def _ours(name: str, spec: Spec, way: Way) -> Contender:
    from bench_lib.ours import DownpourContender

    return DownpourContender(name, spec, way)
