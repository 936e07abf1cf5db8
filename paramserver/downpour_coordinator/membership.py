"""Who belongs to a training: workers that register, are let in or refused, and join where a pass begins.

Functions over a :class:`Training`, whose work they do. The shards know the members before anybody is let in: each
change has a version, and what depends on it waits until all shards have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from downpour_common import messages as m
from downpour_common.layout import ModelSpec
from downpour_common.messages import Refusal
from downpour_common.transport import Peer
from downpour_coordinator.answers import addresses, release_barriers, reply, reply_again
from downpour_coordinator.effects import Send, TrainingEffect
from downpour_coordinator.participants import ShardEntry, Worker

if TYPE_CHECKING:
    from downpour_coordinator.training import Training


def register(training: Training, peer: Peer, message: m.RegisterWorker, effects: list[TrainingEffect]) -> None:
    """A worker asks to be let in. The first model that worker 0 brings is the job's."""
    worker = training.workers[message.slot]
    if message.request in worker.answers:
        reply_again(training, worker, peer, message, effects)
        return
    if worker.gone:
        return
    model = ModelSpec.from_wire(message.model)
    worker.request, worker.pid = message.request, message.pid
    training._waiting[message.slot] = model
    if training.model is None and message.slot == 0:
        training.model = model
        for shard in training.shards.values():
            effects.extend(set_up_shard(training, shard))
        set_up = m.SetUpShard(model.to_wire(), "")
        effects.extend(Send(b.peer, set_up) for b in training.backups.values() if b.peer)
    answer_waiting(training, effects)


def set_up_shard(training: Training, shard: ShardEntry) -> list[TrainingEffect]:
    """Tell a shard what to hold, once that is known; one that comes back, who the members are as well."""
    if training.model is None or not shard.peer or (shard.recovers and not shard.checkpoint):
        return []
    effects: list[TrainingEffect] = []
    model, facts = training.model.to_wire(), training.facts
    if shard.recovers:
        set_up = m.SetUpShard(model, training._folder(shard.checkpoint), True, facts.clock)
    else:
        set_up = m.SetUpShard(model, facts.resume)
    effects.append(Send(shard.peer, set_up))
    if shard.recovers and not shard.since:
        shard.since = training._version + 1
        set_members(training, effects)
    return effects


def answer_waiting(training: Training, effects: list[TrainingEffect]) -> None:
    """Answer the workers that wait: refusals at once, welcomes once the shards are ready for them."""
    if training.model is None:
        return
    for slot, model in list(training._waiting.items()):
        difference = training.model.first_difference(model)
        if difference is not None:
            _refuse(training, slot, Refusal.MODEL_DIFFERS, difference, effects)
        elif training.setup_error:
            _refuse(training, slot, Refusal.CHECKPOINT, training.setup_error, effects)
    if not all(s.serves for s in training.shards.values()):
        return
    if not training.begun:
        protected = training.without_backups or all(b.promotable for b in training.backups.values())
        if protected and all(w.pid or w.gone for w in training.workers.values()):
            training.begun = True
            facts = training.facts
            offset = facts.done[0][1] if facts.done and facts.done[0][0] == 0 and facts.mode.synchronous else 0
            for slot in list(training._waiting):
                _let_in(training, slot, bool(facts.resume), facts.clock, (facts.epoch, offset), effects)
        return
    if training._waiting and (not training.facts.mode.synchronous or not _at_work(training)):
        _admit(training, _whole(training), effects)  # sync: nobody is left whose next pass they could wait for
    _admit(training, [slot for slot in training._waiting if training.workers[slot].takes_over], effects)
    _members_in_force(training, effects)


def _whole(training: Training) -> list[int]:
    """Slots that wait to be let in and whose replicas do so as a whole."""
    ranks = training.facts.ranks
    complete = Counter(slot // ranks for slot in training._waiting)
    return [slot for slot in training._waiting if complete[slot // ranks] == ranks]


def _at_work(training: Training) -> bool:
    """Whether anybody has a part in what the shards do now."""
    return any((w.answered or w.takes_over) and not w.gone for w in training.workers.values())


def _admit(training: Training, slots: Collection[int], effects: list[TrainingEffect]) -> None:
    """Workers that wait are members from now on, as they are."""
    joiners = {slot: training.workers[slot].epoch for slot in slots}
    if not joiners.items() <= training._members.items():
        training._members.update(joiners)
        set_members(training, effects)


def set_members(training: Training, effects: list[TrainingEffect]) -> None:
    """Tell all shards who the members are, as a new version."""
    training._version += 1
    message = members_message(training)
    effects.extend(Send(s.peer, message) for s in training.shards.values() if s.peer and not s.promoting)


def members_message(training: Training) -> m.SetMembers:
    """What a shard is told of the members, and of those that have left."""
    slots = tuple(n for pair in sorted(training._members.items()) for n in pair)
    taken = tuple(s for s in sorted(training._members) if training.workers[s].takes_over)
    return m.SetMembers(training._version, slots, taken, tuple(n for numbers in training._left for n in numbers))


def _members_in_force(training: Training, effects: list[TrainingEffect]) -> None:
    """Once all shards know the members: let joiners in, and begin the passes that waited for it."""
    if any(s.members < training._version for s in training.shards.values()):
        return
    joining = [slot for slot in training._waiting if training._members.get(slot) == training.workers[slot].epoch]
    if not joining and not training._passes:
        return
    clock, epoch = training.clock(), training.data_position()[0]
    if training.facts.mode.synchronous:
        begun = training._data.newest_split()
        epoch = training.facts.epoch if begun is None else begun + (not _at_work(training))
    for _, begin in training._passes.values():
        clock, epoch = max(clock, begin.clock), begin.epoch
    restored = all(s.report.get("initialised") for s in training.shards.values())
    others = training._data.epochs_of_others()
    for slot in joining:
        if training.workers[slot].takes_over:
            then, *position_then = training.workers[slot].start
            _let_in(training, slot, restored, then, (*position_then, *others), effects)
        else:
            _let_in(training, slot, restored, clock, (epoch, 0, *others), effects)
    if joining and tuple(sorted(training._members)) != training._told:
        tell_members(training, effects)
    waiting, training._passes = training._passes, {}
    for peer, begin in waiting.values():
        _pass_begins(training, training.workers[begin.slot], peer, begin, effects)


def _let_in(
    training: Training, slot: int, restored: bool, clock: int, position: tuple[int, ...], effects: list[TrainingEffect]
) -> None:
    worker = training.workers[slot]
    worker.answered = True
    worker.start = (clock, *position[:2])
    del training._waiting[slot]
    slots = tuple(sorted(training._members))
    welcome = m.Welcome(worker.request, addresses(training), restored, clock, position, slots, worker.takes_over)
    reply(worker, worker.peer, welcome, effects)


def _refuse(training: Training, slot: int, code: Refusal, reason: str, effects: list[TrainingEffect]) -> None:
    worker = training.workers[slot]
    del training._waiting[slot]
    reply(worker, worker.peer, m.Refused(worker.request, code.value, reason), effects)


def tell_members(training: Training, effects: list[TrainingEffect]) -> None:
    """Tell the workers who the members are."""
    training._told = tuple(sorted(training._members))
    notice = m.MembersChanged(training._told)
    effects.extend(Send(w.peer, notice) for w in training.workers.values() if w.answered and not w.gone and w.peer)


def begin_pass(
    training: Training, worker: Worker, peer: Peer, begin: m.BeginPass, effects: list[TrainingEffect]
) -> None:
    """The first worker that begins a training pass has left the one before on all shards, so has everybody:
    the moment at which others may join. With a negative clock a worker announces that it leaves, and only asks
    whether it has a part of a pass that is split already."""
    if begin.clock < 0:
        worker.leaving = True
        slots = training._data.splits.get((begin.loader, begin.epoch), [])
        part = (len(slots), slots.index(begin.slot)) if begin.slot in slots else (0, 0)
        reply(worker, peer, m.PassBegins(begin.request, *part), effects)
        return
    if begin.loader == 0 and begin.epoch > worker.begun:
        worker.begun = begin.epoch
        release_barriers(training, effects)
    fresh = begin.loader == 0 and (0, begin.epoch) not in training._data.splits
    if fresh and training._waiting:
        _admit(training, _whole(training), effects)
    if fresh and any(s.members < training._version for s in training.shards.values()):
        worker.answers[begin.request] = None
        training._passes[begin.slot] = (peer, begin)
    else:
        _pass_begins(training, worker, peer, begin, effects)


def _pass_begins(
    training: Training, worker: Worker, peer: Peer, begin: m.BeginPass, effects: list[TrainingEffect]
) -> None:
    training._clock = max(training._clock, begin.clock)
    # Who has finished still counts: when its last word comes must not decide how others' samples are split.
    finished = {w.slot for w in training.workers.values() if w.finished}
    staying = {slot for slot in training._members if slot == begin.slot or not training.workers[slot].leaving}
    workers, index = training._data.split(begin, sorted(filter(training._leads, staying | finished)))
    reply(worker, peer, m.PassBegins(begin.request, workers, index), effects)
