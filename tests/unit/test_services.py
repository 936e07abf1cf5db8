"""The thin loops around the state machines: what a stranger sends must not end them."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from unit_kit import JOB, model, tensor

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import PeerTimeout
from downpour_common.layout import ModelSpec
from downpour_common.modes import parse_mode
from downpour_common.transport.memory import MemoryClient, MemoryNetwork
from downpour_coordinator.service import CoordinatorService
from downpour_coordinator.state import Coordinator, JobFacts
from downpour_server.config import ShardConfig
from downpour_server.service import ShardService

MODEL = model(tensor("w", 4))
HELLO = m.Hello(7, JOB, 0, 0, MODEL.digest)
CONFIG = ShardConfig(JOB, 0, 3, "coordinator", "server-0", 2, 1, "async", 1024, 10.0, 60.0)


def arrived(client: MemoryClient) -> list[m.Message]:
    """All that has come back to a client."""
    found: list[m.Message] = []
    while got := client.poll(0):
        found += [message for _, message in got]
    return found


def serve(*data: m.Message, spec: Any = None) -> tuple[list[m.Message], list[m.Message]]:
    """A shard that is set up, gets ``data``, one message per turn of its loop, and is then told to stop.

    What the worker and what the coordinator were told.
    """
    network = MemoryNetwork()
    coordinator, worker = network.server("coordinator"), network.client()
    control = network.client()
    service = ShardService(CONFIG, network.server("server-0"), control, clock=lambda: 0.0)
    document = MODEL.to_wire() if spec is None else spec
    for message in [m.SetUpShard(document, ""), *[m.ShouldStop("not for shards")] * (len(data) + 1), m.StopShard()]:
        control.inbox.put(("coordinator", list(wire.encode(message))))
    for message in [m.Pull(1, JOB, 0, 0, 0), *data]:  # the first comes before the set-up
        worker.send("server-0", message)
    service.run()
    told = [message for _ in range(coordinator.inbox.qsize()) for _, message in coordinator.poll(0)]
    return arrived(worker), told


def test_a_shard_registers_gets_ready_answers_reports_and_stops() -> None:
    answers, told = serve(HELLO)
    assert answers == [m.HelloReply(7, 0, 3, 0)]
    register, ready, report = told
    assert isinstance(register, m.RegisterShard)
    assert (register.job, register.shard, register.shard_epoch, register.address) == (JOB, 0, 3, "server-0")
    assert ready == m.ShardReady(0, "")
    assert isinstance(report, m.ShardReport)


@pytest.mark.parametrize(
    "message",
    [
        m.StopShard(),
        m.Ack(1, 0),
        m.Weights(1, 0, 0, b""),
        m.RegisterShard(JOB, 0, 0, 1, "elsewhere"),
        m.Push(2, JOB, 3, 0, 0, 0, 0, 0, 1, (), b"\xc1", bytes(16)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_shard_goes_on_after_a_message_that_makes_no_sense(message: m.Message) -> None:
    answers, _ = serve(message, HELLO)
    assert m.HelloReply(7, 0, 3, 0) in answers


@pytest.mark.parametrize(
    "document",
    [{}, {**MODEL.to_wire(), "rule": "Lion"}],
    ids=["malformed", "unknown rule"],
)
def test_a_shard_that_cannot_be_set_up_says_why(document: dict[str, Any]) -> None:
    _, told = serve(spec=document)
    ready = [message for message in told if isinstance(message, m.ShardReady)]
    assert len(ready) == 1
    assert ready[0].error


def test_a_shard_that_is_never_set_up_gives_up_by_name() -> None:
    network = MemoryNetwork()
    network.server("coordinator")
    times = iter([0.0, 59.0, 61.0])
    service = ShardService(CONFIG, network.server("server-0"), network.client(), clock=lambda: next(times))
    with pytest.raises(PeerTimeout, match="coordinator"):
        service.run()


# ---------------------------------------------------------------- the coordinator


class Desk:
    """A coordinator's service with one client."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.metrics = io.StringIO()
        facts = JobFacts(JOB, 1, 0, parse_mode("async"), 0, 1024)
        self.transport = self.network.server("coordinator")
        self.service = CoordinatorService(Coordinator(facts), self.transport, self.metrics, lambda *_: None)
        self.client = self.network.client()

    def tell(self, *messages: m.Message) -> list[m.Message]:
        """Send; what came back."""
        for message in messages:
            self.client.send("coordinator", message)
        self.service.pump()
        return arrived(self.client)


@pytest.mark.parametrize(
    "message",
    [
        m.Ack(1, 0),
        m.ShardReady(9, ""),
        m.SnapshotTaken(9, 1, "", {}),
        m.RegisterWorker(1, JOB, 0, 0, 1, {"tensors": 5}),
        m.EnterBarrier(1, 99, "barrier"),
        m.TakeLease(1, 99, -1, -1, -1, -1, "", (5, 1, 3)),
        m.Progress(-1, -1, -1, -1, -1, -1, -1, -1, math.nan),
    ],
    ids=lambda message: type(message).__name__,
)
def test_the_coordinator_goes_on_after_a_message_that_makes_no_sense(message: m.Message) -> None:
    desk = Desk()
    answers = desk.tell(message, m.RegisterWorker(7, JOB, 0, 0, 1, MODEL.to_wire()))
    assert m.Welcome(7, (), False, 0, (0, 0)) in answers
    assert isinstance(desk.service.state.model, ModelSpec)


def _refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_metrics_are_json_whatever_is_logged() -> None:
    desk = Desk()
    desk.tell(m.LogMetrics(0, 3, {"loss": math.nan, "best": -math.inf, "accuracy": 0.5}))
    rows = [json.loads(line, parse_constant=_refuse) for line in desk.metrics.getvalue().splitlines()]
    assert len(rows) == 1
    assert (rows[0]["worker"], rows[0]["clock"], rows[0]["accuracy"]) == (0, 3, 0.5)
