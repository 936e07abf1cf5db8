"""What workers that have joined ask for: samples, barriers, agreements, their goodbye.

Functions over a :class:`Training`, whose work they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.messages import Message, Refusal
from downpour_common.modifiers import WARM_START
from downpour_common.transport import Peer
from downpour_coordinator.answers import minimise, release_barriers, reply, reply_again
from downpour_coordinator.effects import LogRow, Send, StoreSpans, TrainingEffect
from downpour_coordinator.membership import begin_pass, set_members
from downpour_coordinator.participants import Worker

if TYPE_CHECKING:
    from downpour_coordinator.training import Training

REASON_CHARACTERS = 200
"""Of why the training is done."""


def take_request(
    training: Training, worker: Worker, peer: Peer, message: m.WorkerRequest, effects: list[TrainingEffect]
) -> None:
    """One request of a worker that has joined; a repeat gets the answer again."""
    if message.request in worker.answers:
        reply_again(training, worker, peer, message, effects)
        return
    if worker.gone:
        return  # what it asked for before it left
    match message:
        case m.TakeLease() | m.BeginPass() | m.EnterBarrier() if not training._leads(message.slot):
            reason = f"worker/{message.slot} is one of a replica, for which its first worker speaks"
            reply(worker, peer, m.Refused(message.request, Refusal.FORBIDDEN.value, reason), effects)
        case m.TakeLease():
            if min(message.loader, message.epoch, message.total, message.unit, *message.done) < 0:
                raise ProtocolError("a lease of a negative number of samples")
            lease = training._data.take(message, sum(map(training._leads, training._members)))
            if isinstance(lease, str):
                answer: Message = m.Refused(message.request, Refusal.DATA_DIFFERS.value, lease)
            else:
                answer = m.Lease(message.request, *lease)
            reply(worker, peer, answer, effects)
        case m.LogMetrics():
            numbers = {k: float(v) for k, v in message.values.items() if isinstance(v, (int, float))}
            training.latest.update(numbers)
            effects.append(LogRow({**numbers, "worker": message.slot, "clock": message.clock}))
            reply(worker, peer, m.Ack(message.request, 0), effects)
        case m.Spans():
            effects.append(StoreSpans(peer, message))
        case m.EnterBarrier() if worker.takes_over and worker.begun < 0 <= worker.former:
            # It comes through the beginning of the script, where all have been together before.
            reply(worker, peer, m.Ack(message.request, 0), effects)
        case m.EnterBarrier():
            worker.answers[message.request] = None
            training._barriers.enter(message.name, message.slot, peer, message.request)
            release_barriers(training, effects)
        case m.BeginPass():
            begin_pass(training, worker, peer, message, effects)
        case m.Agree():
            _agree(training, peer, message, effects)
        case m.TakePortion():
            training._minimiser.asked(worker.slot, peer, message, len(training._members))
            minimise(training, effects)
        case m.EndTraining():
            reply(worker, peer, m.Ack(message.request, 0), effects)
            _end_training(training, message, effects)
        case m.Goodbye():
            _goodbye(training, worker, peer, message, effects)
        case _:
            raise ProtocolError(f"the coordinator does not take {type(message).__name__}")


def _goodbye(training: Training, worker: Worker, peer: Peer, message: m.Goodbye, effects: list[TrainingEffect]) -> None:
    """It leaves, for good."""
    reply(worker, peer, m.Ack(message.request, 0), effects)
    worker.drained, worker.finished = message.drained, not message.drained
    training.torn += max(0, message.torn) if training._leads(message.slot) else 0
    if message.done >= 0:
        training._left.append((message.slot, message.worker_epoch, message.first, message.done))
    training.worker_gone(message.slot, effects, done=not message.drained)
    if any(s.recovers for s in training.shards.values()):
        set_members(training, effects)  # one that has come back may not know that it left


def _end_training(training: Training, message: m.EndTraining, effects: list[TrainingEffect]) -> None:
    """The first reason counts."""
    if not training.done_because:
        training.done_because = message.reason[:REASON_CHARACTERS] or "done"
        effects.append(LogRow({"ends": training.done_because, "worker": message.slot, "clock": message.clock}))
    told = m.ShouldStop(training.done_because, by_script=True)
    effects.extend(Send(w.peer, told) for w in training.workers.values() if w.answered and w.peer and not w.gone)


def _agree(training: Training, peer: Peer, message: m.Agree, effects: list[TrainingEffect]) -> None:
    """Not among a worker's answers: a repeat finds the value where the first asker did."""
    if message.proposes:
        for other, request in training._agreements.propose(message.key, message.value).values():
            effects.append(Send(other, m.Agreed(request, training._agreements.values[message.key])))
    if message.key in training._agreements.values:
        effects.append(Send(peer, m.Agreed(message.request, training._agreements.values[message.key])))
    else:
        training._agreements.wait(message.key, message.slot, peer, message.request)
        nobody_to_wait_for(training, effects)


def nobody_to_wait_for(training: Training, effects: list[TrainingEffect]) -> None:
    """Those who wait for worker 0's first steps go on if it takes no more."""
    first = [worker for slot, worker in training.workers.items() if slot < training.facts.ranks]
    if training._agreements.awaited(WARM_START) and all(worker.gone for worker in first):
        for peer, request in training._agreements.propose(WARM_START, b"gone").values():
            effects.append(Send(peer, m.Agreed(request, training._agreements.values[WARM_START])))
