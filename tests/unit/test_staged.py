"""Payloads that come ahead of their push-pull: held, checked, used once; and what replaces those that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit_kit import JOB, ShardDriver, model, payload, refusal, tensor, values_of

from downpour.client.core import ClientCore, Submission, Ticket
from downpour_common import messages as m
from downpour_common import wire
from downpour_common.messages import Refusal

MODEL = model(tensor("a", 4), tensor("b", 3, kind="buffer"))
ONES, TWOS = torch.ones(4), torch.full((4,), 2.0)


@pytest.fixture
def driver() -> ShardDriver:
    driver = ShardDriver(MODEL)
    driver.init_all()
    return driver


def stage(driver: ShardDriver, values: torch.Tensor, slot: int = 0, chunk: int = 0, **others: Any) -> m.Message | None:
    fields = {"job": JOB, "slot": slot, "worker_epoch": 0, "chunk": chunk, "payload": payload(values)}
    return driver.send(m.Stage(driver.number(), **{**fields, **others}))


def push(
    driver: ShardDriver,
    staged: m.Message | None,
    meant: torch.Tensor | None,
    slot: int = 0,
    seq: int = 0,
    **others: Any,
) -> m.Message | None:
    assert isinstance(staged, m.Staged)
    digest = b"" if meant is None else wire.digest(payload(meant))
    fields: dict[str, Any] = {
        "job": JOB,
        "shard_epoch": 5,
        "slot": slot,
        "worker_epoch": 0,
        "seq": seq,
        "base_version": 0,
        "chunk": 0,
        "samples": 1,
        "position": (),
        "hyper": b"",
        "stage": staged.request,
        "digest": digest,
    }
    return driver.send(m.PushPullStaged(driver.number(), **{**fields, **others}))


def held(driver: ShardDriver) -> int:
    return len(driver.shard._staged)


@pytest.mark.parametrize("meant", [ONES, None])
def test_it_changes_nothing_until_it_is_pushed(driver: ShardDriver, meant: torch.Tensor | None) -> None:
    staged = stage(driver, ONES)
    assert isinstance(staged, m.Staged)
    assert staged.digest == wire.digest(payload(ONES))
    assert driver.weights().tolist() == [0.0] * 4
    assert driver.shard.stats.applied == 0
    assert values_of(push(driver, staged, meant)) == [1.0] * 4
    assert held(driver) == 0
    assert (driver.shard.stats.staged, driver.shard.stats.applied, driver.shard.stats.bytes_in) == (1, 1, 16)


def test_what_came_torn_or_has_changed_is_not_applied(driver: ShardDriver) -> None:
    torn = stage(driver, torch.tensor([1.0, 1.0, 2.0, 2.0]))
    assert refusal(push(driver, torn, TWOS))[0] == Refusal.NOT_STAGED
    assert held(driver) == 0
    assert driver.weights().tolist() == [0.0] * 4
    assert values_of(driver.push_pull(0, 0, 0, TWOS)) == [2.0] * 4, "nothing was recorded under its seq"


def test_only_what_is_meant_is_used(driver: ShardDriver) -> None:
    first, second = stage(driver, ONES), stage(driver, TWOS)
    assert held(driver) == 1
    assert refusal(push(driver, first, None))[0] == Refusal.NOT_STAGED
    of_another = stage(driver, TWOS, slot=1)
    assert refusal(push(driver, second, None))[0] == Refusal.NOT_STAGED, "it was dropped with the wrong push"
    assert refusal(push(driver, stage(driver, ONES), None, worker_epoch=1))[0] == Refusal.NOT_STAGED
    assert values_of(push(driver, of_another, TWOS, slot=1)) == [2.0] * 4


@pytest.mark.parametrize("fetch", [True, False])
def test_an_ordinary_contribution_takes_its_place(driver: ShardDriver, fetch: bool) -> None:
    staged = stage(driver, ONES)
    driver.send(driver.pushed(0, 0, 0, TWOS, fetch=fetch))
    assert held(driver) == 0
    assert refusal(push(driver, staged, ONES, seq=1))[0] == Refusal.NOT_STAGED
    assert driver.weights().tolist() == [2.0] * 4


def test_a_repeat_is_answered_and_not_applied_again(driver: ShardDriver) -> None:
    staged = stage(driver, ONES)
    assert values_of(push(driver, staged, ONES)) == [1.0] * 4
    assert values_of(push(driver, staged, ONES)) == [1.0] * 4
    assert values_of(driver.push_pull(0, 0, 0, ONES)) == [1.0] * 4
    assert (driver.shard.stats.applied, driver.shard.stats.repeats) == (1, 2)


def test_not_a_number_is_kept_and_refused_when_it_is_pushed(driver: ShardDriver) -> None:
    """A script whose scaler skips the step must not fail."""
    bad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    code, reason = refusal(push(driver, stage(driver, bad), None))
    assert code == Refusal.NON_FINITE
    assert reason == refusal(driver.push_pull(0, 0, 0, bad))[1]
    assert values_of(push(driver, stage(driver, ONES), ONES)) == [1.0] * 4


def test_it_waits_for_its_round_as_any_other() -> None:
    driver = ShardDriver(MODEL, "sync")
    driver.init_all()
    staged = stage(driver, ONES)
    assert push(driver, staged, ONES) is None
    assert values_of(driver.push_pull(0, 1, 0, 3 * ONES)) == [2.0] * 4
    assert driver.weights().tolist() == [2.0] * 4


def test_what_does_not_belong_here_is_refused(driver: ShardDriver) -> None:
    assert refusal(stage(driver, torch.ones(3), chunk=1))[0] == Refusal.MALFORMED
    assert refusal(stage(driver, torch.ones(5)))[0] == Refusal.MALFORMED
    assert refusal(stage(driver, ONES, chunk=9))[0] == Refusal.MALFORMED
    assert refusal(stage(driver, ONES, slot=7))[0] == Refusal.MALFORMED
    assert refusal(stage(driver, ONES, job="another"))[0] == Refusal.WRONG_JOB
    assert held(driver) == 0
    staged = stage(driver, ONES)
    assert refusal(push(driver, staged, ONES, shard_epoch=6))[0] == Refusal.STALE_EPOCH
    staged = stage(driver, ONES)
    assert push(driver, staged, ONES, shard_epoch=4) is None, "it comes again"
    assert refusal(push(driver, staged, ONES, chunk=9))[0] == Refusal.NOT_STAGED


def test_nothing_is_left_of_a_worker_that_is_gone(driver: ShardDriver) -> None:
    for slot in (0, 1):
        stage(driver, ONES, slot=slot)
    assert held(driver) == 2
    driver.leave(1)
    assert held(driver) == 1
    driver.members(1, (0, 3), (1, 0))
    assert held(driver) == 0
    assert refusal(stage(driver, ONES))[0] == Refusal.STALE_EPOCH
    assert isinstance(stage(driver, ONES, worker_epoch=3), m.Staged)
    driver.members(2, (1, 0))
    assert held(driver) == 0


# ---------------------------------------------------------------- the worker's side


def committed(core: ClientCore, number: int, ticket: Ticket, nbytes: int = 60) -> None:
    message = m.PushPullStaged(number, JOB, 5, 0, 0, 0, 0, 0, 1, (), b"", number - 1, b"")
    instead = m.PushPull(number + 100, JOB, 5, 0, 0, 0, 0, 0, 1, (), b"", b"....")
    core.submit(Submission("a", message, ticket, "weights", 9.0, nbytes, instead=lambda: instead), 0.0)


def test_what_the_shard_does_not_hold_is_sent_at_once_with_its_payload() -> None:
    core, ticket, answers = ClientCore(100), Ticket(2), Ticket(1)
    core.submit(Submission("a", m.Stage(1, JOB, 0, 0, 0, b"...."), answers, "chunk to be kept", 9.0, 50), 0.0)
    core.submit(Submission("a", m.Stage(3, JOB, 0, 0, 0, b"...."), Ticket(1), "chunk to be kept", 9.0, 50), 0.0)
    assert [message.request for _, message in core.outgoing()] == [1, 3]  # type: ignore[attr-defined]
    core.received(m.Staged(1, b""))
    committed(core, 2, ticket, 50)
    committed(core, 4, ticket, 50)
    assert [message.request for _, message in core.outgoing()] == [2]  # type: ignore[attr-defined]
    core.received(m.Refused(2, Refusal.NOT_STAGED, "it is not there"))
    assert [message.request for _, message in core.outgoing()] == [102, 4], "others may wait for it, so needs no credit"  # type: ignore[attr-defined]
    core.received(m.Refused(4, Refusal.NOT_STAGED, "it is not there"))
    [(_, again)] = core.outgoing()
    assert isinstance(again, m.PushPull)
    assert core._servers["a"].unanswered_bytes == 0, "the payload that was lost takes no credit any more"
    for number in (102, 104):
        core.received(m.Weights(number, 0, 1, b""))
    ticket.wait()
    assert not core._in_flight


def test_other_refusals_fail_as_ever() -> None:
    core, ticket = ClientCore(100), Ticket(1)
    committed(core, 2, ticket)
    core.outgoing()
    core.received(m.Refused(2, Refusal.NON_FINITE, "holds NaN"))
    assert ticket.error is not None
    assert core.outgoing() == []
