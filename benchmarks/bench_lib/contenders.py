"""The registry: every contender, in the order of turns. A new one is a file and a line here."""

from __future__ import annotations

from bench_lib.contender import MB, Contender, Entry, Spec

REFERENCE = "zmq-ipc"  # what goodputs are compared with

COPY = "1x copy"
TWO_COPIES = "2x copies"
ONE_WAY = "1x one way"
BOTH_WAYS = "2x there+back"
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
        Entry("zmq-tcp-echo", "limit", 2, BOTH_WAYS, _zmq_tcp_echo),
        Entry("sgd-fused", "limit", 1, STEP, _sgd),
        Entry("adam-fused", "limit", 1, STEP, _adam),
        Entry("torch-rpc-ps", "peer", 2, PUSH_PULL, _torch_rpc),
        Entry("gloo-allreduce", "peer", 2, ALL_REDUCE, _gloo),
        Entry("ray-ps", "peer", 2, PUSH_PULL, _ray),
        _ours("downpour"),
        _ours("downpour-auto", "--threads", "auto"),  # the default: shards use the cores that wait
        _ours("downpour-2s", "-s", "2"),
        _ours("downpour-copied", "--set", "in_place=false"),
        _ours("downpour-ipc", "--set", "shared_memory=false"),
        _ours("downpour-tcp", "--set", "transport=tcp"),
        _ours("downpour-tcp-2s", "--set", "transport=tcp", "-s", "2"),
        Entry("downpour-curve", "ours", 2, PUSH_PULL, _curve),
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
    from bench_lib.streams import stream

    return stream(name, spec, "ipc")


def _zmq_tcp(name: str, spec: Spec) -> Contender:
    from bench_lib.streams import stream

    return stream(name, spec, "tcp")


def _zmq_tcp_echo(name: str, spec: Spec) -> Contender:
    from bench_lib.streams import echo

    return echo(name, spec, "tcp")


def _torch_rpc(name: str, spec: Spec) -> Contender:
    from bench_lib.peer_rpc import RpcContender

    return RpcContender(name, spec)


def _ray(name: str, spec: Spec) -> Contender:
    from bench_lib.peer_ray import RayContender

    return RayContender(name, spec)


def _gloo(name: str, spec: Spec) -> Contender:
    from bench_lib.peer_gloo import GlooContender

    return GlooContender(name, spec)


def _ours(name: str, *options: str) -> Entry:
    """A job under ``downpour run`` with these options; one thread per process, as everyone here."""

    def build(name: str, spec: Spec) -> Contender:
        from bench_lib.local_job import PushPullJob

        return PushPullJob(name, spec.payload_bytes // MB, spec.timeout_s, ["--threads", "1", *options])

    return Entry(name, "ours", 2, PUSH_PULL, build)


def _curve(name: str, spec: Spec) -> Contender:
    from bench_lib.ours import CurveContender

    return CurveContender(name, spec)
