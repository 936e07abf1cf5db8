"""The thin loop around the coordinator's state machine: what a stranger sends must not end it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from unit_kit import JOB, model, tensor

from downpour_common import messages as m
from downpour_common.config import job_spec
from downpour_common.layout import ModelSpec
from downpour_common.modes import parse_mode
from downpour_coordinator.effects import FindCheckpoint
from downpour_coordinator.facts import JobFacts
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.phases import Phase
from downpour_coordinator.service import JobService

MODEL = model(tensor("w", 4))


class Desk:
    """A job's service with one client."""

    def __init__(self) -> None:
        self.metrics = io.StringIO()
        spec = job_spec(name="job", script="train.py", workers=1, shards=1, mode="async")
        facts = JobFacts(JOB, 1, 1, parse_mode("async"), 0, 1024)
        self.job = Lifecycle(JOB, spec, facts, "/nowhere/")
        self.job.begin(0.0)
        self.answers: list[m.Message] = []
        self.service = JobService(self.job, "/nowhere", self._send, self.metrics, lambda: 0.0)

    def _send(self, _peer: bytes, message: m.Message) -> None:
        self.answers.append(message)

    def tell(self, *messages: m.Message) -> list[bool]:
        """Send; which of them made sense."""
        return [self.service.take(b"peer", message) for message in messages]


@pytest.mark.parametrize(
    "message",
    [
        m.Ack(1, 0),
        m.ShardReady(JOB, 9, 0, ""),
        m.SnapshotTaken(JOB, 9, 0, 1, "", {}),
        m.RegisterWorker(1, JOB, 0, 0, 1, {"tensors": 5}),
        m.EnterBarrier(1, JOB, 99, 0, "barrier"),
        m.TakeLease(1, JOB, 99, 0, -1, -1, -1, -1, "", (5, 1, 3)),
        m.Progress(JOB, -1, -1, -1, -1, -1, -1, -1, -1, -1, math.nan),
    ],
    ids=lambda message: type(message).__name__,
)
def test_the_coordinator_goes_on_after_a_message_that_makes_no_sense(message: m.Message) -> None:
    desk = Desk()
    desk.tell(message)
    assert (
        desk.tell(
            m.RegisterWorker(7, JOB, 0, 0, 1, MODEL.to_wire()),
            m.RegisterShard(JOB, 0, 0, 1, "server-0"),
            m.ShardReady(JOB, 0, 0, ""),
        )
        == [True] * 3
    )
    assert m.Welcome(7, ("server-0",), False, 0, (0, 0), (0,)) in desk.answers
    assert isinstance(desk.job.training.model, ModelSpec)


def _refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_metrics_are_json_whatever_is_logged_and_logged_once_if_repeated() -> None:
    desk = Desk()
    log = m.LogMetrics(1, JOB, 0, 0, 3, {"loss": math.nan, "best": -math.inf, "accuracy": 0.5})
    assert desk.tell(log, log) == [True, True]
    assert desk.answers == [m.Ack(1, 0)] * 2
    rows = [json.loads(line, parse_constant=_refuse) for line in desk.metrics.getvalue().splitlines()]
    assert len(rows) == 1
    assert (rows[0]["worker"], rows[0]["clock"], rows[0]["accuracy"]) == (0, 3, 0.5)


def test_a_job_whose_checkpoints_are_all_damaged_begins_again_where_it_began() -> None:
    desk = Desk()
    job = desk.job
    job.training = job.training.anew(replace(job.training.facts, resume="/nowhere/checkpoints/000007", clock=90))
    job.phase = Phase.WAITING
    desk.service.carry_out([FindCheckpoint()])
    assert (job.training.facts.resume, job.training.facts.clock, job.phase) == ("", 0, Phase.QUEUED)
    again = Lifecycle.from_document(JOB, job.document(), None, 0.0)
    assert again.origin == job.origin
