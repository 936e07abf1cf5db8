"""`downpour.stop`: one script says that the training is done, and all are told."""

from __future__ import annotations

from coordinator_kit import Job

from downpour_common import messages as m


def say_done(job: Job, slot: int, reason: str) -> m.EndTraining:
    request = m.EndTraining(job.number(), *job.me(slot), 12, reason)
    job.say(b"worker %d" % slot, request)
    return request


def progress(job: Job, slot: int) -> None:
    job.say(b"worker %d" % slot, m.Progress(*job.me(slot), 13, 0, 0, 0, 0, 0, 0, 0.0, ()))


def test_every_worker_is_told_and_the_reason_is_kept() -> None:
    job = Job(workers=3).start()
    job.goodbye(2)
    job.sent.clear()
    request = say_done(job, 1, "it balances")
    stop = m.ShouldStop("it balances", by_script=True)
    assert job.sent == {b"worker 0": [stop], b"worker 1": [m.Ack(request.request, 0), stop]}
    assert job.rows == [{"ends": "it balances", "worker": 1, "clock": 12}]


def test_the_first_reason_counts_and_a_repeat_is_answered_again() -> None:
    job = Job().start()
    request = say_done(job, 0, "")
    job.sent.clear()
    job.say(b"worker 0", request)
    assert job.sent == {b"worker 0": [m.Ack(request.request, 0)]}
    say_done(job, 1, "so it is")
    assert job.state.done_because == "done"
    assert len(job.rows) == 1


def test_who_has_not_heard_it_is_told_again_also_by_another_coordinator() -> None:
    job = Job().start()
    progress(job, 1)
    assert job.told(b"worker 1") == []
    say_done(job, 0, "x" * 300)
    job.restarted()
    progress(job, 1)
    assert job.told(b"worker 1")[-1] == m.ShouldStop("x" * 200, by_script=True)


def test_a_training_that_begins_again_is_not_done() -> None:
    job = Job().start()
    say_done(job, 0, "done")
    assert job.state.anew(job.facts).done_because == ""
