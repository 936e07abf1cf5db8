"""What workers are answered: once, again to a repeat, or when a barrier opens or the minimiser has something to say.

Functions over a :class:`Training`, whose work they do.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from downpour_common import messages as m
from downpour_common.transport import Peer
from downpour_coordinator.effects import LogRow, Send, TrainingEffect
from downpour_coordinator.participants import Worker

if TYPE_CHECKING:
    from downpour_coordinator.training import Training

ANSWERS_KEPT = 64
"""Answers remembered per worker, for repeats of its requests."""


def reply(worker: Worker, peer: Peer, answer: Any, effects: list[TrainingEffect]) -> None:
    """Answer a request, and remember the answer for repeats of it."""
    worker.answers[answer.request] = answer
    while len(worker.answers) > ANSWERS_KEPT:
        del worker.answers[next(iter(worker.answers))]
    effects.append(Send(peer, answer))


def reply_again(
    training: Training, worker: Worker, peer: Peer, message: m.WorkerRequest, effects: list[TrainingEffect]
) -> None:
    """A repeat: the same answer, or, while there is none yet, a new address for it."""
    answer = worker.answers[message.request]
    if isinstance(answer, m.Welcome):
        if not all(s.serves for s in training.shards.values()):
            return  # it will ask again
        answer = replace(answer, shards=addresses(training))  # a shard may have moved since
    if answer is not None:
        effects.append(Send(peer, answer))
    elif isinstance(message, m.EnterBarrier):
        training._barriers.asked_again(message.name, message.slot, peer, message.request)
    elif isinstance(message, m.BeginPass) and message.slot in training._passes:
        training._passes[message.slot] = (peer, message)


def addresses(training: Training) -> tuple[str, ...]:
    """Where each shard can be reached, by index."""
    return tuple(training.shards[i].address for i in range(training.facts.shards))


def release_barriers(training: Training, effects: list[TrainingEffect]) -> None:
    """Answer those whose barrier all others have entered, or need not enter."""
    leads = [w for w in training.workers.values() if training._leads(w.slot) and not w.gone]
    live = {w.slot for w in leads if w.answered or w.takes_over or not training.begun}
    for slot, (peer, request) in training._barriers.opened(live, lambda slot, entered: _past(training, slot, entered)):
        reply(training.workers[slot], peer, m.Ack(request, 0), effects)


def _past(training: Training, slot: int, entered: Collection[int]) -> bool:
    """Whether a worker that has taken over has begun behind a barrier: it is in a later pass than those in it."""
    worker = training.workers[slot]
    return worker.takes_over and worker.begun > max((training.workers[s].begun for s in entered), default=worker.begun)


def minimise(training: Training, effects: list[TrainingEffect]) -> None:
    """Send what mode lbfgs has to say."""
    found = training._minimiser
    for slot, peer, answer in found.answers:
        reply(training.workers[slot], peer, answer, effects)
    effects.extend(Send(training.workers[slot].peer, notice) for slot, notice in found.notices)
    if found.command is not None:
        shards = [training.shards[i] for i in found.commands]
        effects.extend(Send(shard.peer, found.command) for shard in shards if shard.peer)
    effects.extend(LogRow(row) for row in found.rows)
    training.latest.update(found.latest())
    found.said()
