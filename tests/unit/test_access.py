"""Who may say what to the coordinator: a table, and everything that is not in it is refused."""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import Any

import pytest

from downpour_common import messages as m
from downpour_common.messages import Buffer, Document, Message
from downpour_coordinator.access import allowed

SAMPLES: dict[Any, Any] = {
    int: 0,
    str: "job-1",
    bool: False,
    float: 0.0,
    bytes: b"",
    Document: {},
    Buffer: b"",
    tuple[int, ...]: (),
    tuple[str, ...]: (),
}
TYPES = sorted(
    (t for t in vars(m).values() if isinstance(t, type) and issubclass(t, Message) and "TAG" in vars(t)),
    key=lambda t: t.__name__,
)
AGENT = {"Heartbeat", "LogData", "NodeLeaving", "Ping", "ProcessEnded", "RegisterNode"}
USER = {
    "CancelJob", "DescribeJob", "DrainNode", "GetFile", "ListFiles", "ListJobs", "ListNodes", "Ping", "PutBundle",
    "CheckpointNow", "ScaleJob", "SetJob", "SubmitJob",
}  # fmt: skip
PROCESS = {
    "Agree", "BeginPass", "EndTraining", "EnterBarrier", "Goodbye", "LogMetrics", "MembersSet", "Progress", "Promoted",
    "RegisterShard", "RegisterWorker", "ReportFailure", "ShardReady", "ShardReport", "SnapshotPart", "SnapshotTaken",
    "Spans", "TakeLease", "TakePortion", "VectorsDone",
}  # fmt: skip
TABLE = {
    "user": USER,
    "user/alice": USER,
    "server": AGENT,
    "server/rack-1": AGENT,
    "worker": AGENT,
    "worker/rack-1": AGENT,
    "job/job-1": PROCESS,
    "job/job-2": set[str](),
    "job/": set[str](),
    "job": set[str](),
    "coordinator": set[str](),
    "users": set[str](),
    "User": set[str](),
    "/user": set[str](),
    "job/job-1/more": set[str](),
}


def sample(kind: type[Message], **others: Any) -> Message:
    """A message of this kind, of job job-1."""
    hints = typing.get_type_hints(kind)
    values = {f.name: SAMPLES[hints[f.name]] for f in fields(kind)}
    return kind(**{**values, **{k: v for k, v in others.items() if k in values}})


@pytest.mark.parametrize("sender", TABLE)
def test_the_table(sender: str) -> None:
    role = sender.partition("/")[0]
    found = {t.__name__ for t in TYPES if allowed(sender, sample(t, role=role))}
    assert found == TABLE[sender]


def test_every_message_to_the_coordinator_is_in_the_table() -> None:
    assert {t.__name__ for t in TYPES} >= AGENT | USER | PROCESS


def test_without_security_everybody_may_say_everything() -> None:
    assert all(allowed("", sample(t)) for t in TYPES)


@pytest.mark.parametrize("name", sorted(PROCESS))
def test_a_job_does_not_speak_for_another(name: str) -> None:
    for job in ("job-2", "", "job-1 ", "job"):
        assert not allowed("job/job-1", sample(getattr(m, name), job=job))


@pytest.mark.parametrize("name", ["RegisterNode", "LogData", "ProcessEnded"])
@pytest.mark.parametrize(("sender", "role"), [("server", "worker"), ("worker", "server"), ("worker", "../x")])
def test_an_agent_does_not_speak_for_the_other_role(name: str, sender: str, role: str) -> None:
    assert not allowed(sender, sample(getattr(m, name), role=role))


@pytest.mark.parametrize(
    ("path", "may"),
    [
        ("bundle", True),
        ("checkpoints/000001/manifest.json", True),
        ("model.safetensors", False),
        ("logs/worker-0.log", False),
        ("metrics.jsonl", False),
        ("bundle/x", False),
        ("../checkpoints/x", False),
        ("", False),
    ],
)
def test_agents_read_what_their_processes_need(path: str, may: bool) -> None:
    message = m.GetFile(1, "job-1", path, 0, 1)
    assert [allowed(sender, message) for sender in ("server", "worker", "user", "job/job-1")] == [may, may, True, False]
