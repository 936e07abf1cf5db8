"""A shard and its backup as state machines: messages in, effects out. No sockets, no clock, no files.

The leader passes every input that changes its state, in order and numbered, to one follower, which feeds a shard of its
own with them and lets go of what comes out. Both go through the same states, because a shard's state follows from its
inputs alone: time only ever refuses requests (``Shard.tick``), which are the connections' and not carried, so it is not
passed on. No answer leaves the leader before the follower holds every input that was taken before it. So whatever a
worker has been answered is at the follower, windows against repeats included; what it has not been answered, it sends
again to whoever leads then.

Terms: a follower that has been promoted, or follows a newer leader, tells older ones that they are fenced; they never
get another acknowledgement, so no answer of theirs leaves, whatever they believe.

Only the coordinator decides who leads, and whether a leader may answer alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import ProtocolError
from downpour_common.messages import Buffer, Message
from downpour_common.transport import Peer
from downpour_server.effects import NOBODY, Effect, Kept, Reply, SendKept, SendWeights, Tell
from downpour_server.shard import Shard
from downpour_server.snapshot import Reading
from downpour_server.state import Image, Received

PARTS = 8
"""Parts of the state that are under way at most."""
CLOSE_ITEMS, CLOSE_BYTES = 64, 32 << 20
"""A follower that is no further behind than that has caught up."""
PATIENCE = 4
"""How many times the inputs that came during the state's transfer may come again, before it is waited for."""
GIVE_UP_BYTES = 2 << 30
"""Inputs kept for a follower that does not catch up, before it has to begin anew."""
KEPT_APPLIED = 64
"""Inputs that a follower acknowledges, at most, before it applies them."""


@dataclass(slots=True)
class _Sent:
    """An item that the follower may not hold yet. ``taken``: inputs that it stands for, with all before it."""

    message: m.Item
    taken: int
    nbytes: int


@dataclass(slots=True)
class _Stream:
    """What one follower is told."""

    peer: Peer
    number: int
    parts: Iterator[tuple[Buffer, bool]]
    reading: Reading
    items: deque[_Sent] = field(default_factory=deque)
    newest: int = 0
    acked: int = 0
    nbytes: int = 0
    """of ``items``"""
    open_parts: int = 0
    sent: bool = False
    """the whole state is"""
    late: int = -1
    """inputs at which the follower is waited for; -1: it does not hold the state yet"""
    complete: int = 0
    """number of the ReplicaComplete; 0: it has not been sent"""
    doubt: tuple[int, int] = (-1, -1)
    """what was held and what had been sent when the follower last said the same twice"""


class Leader:
    """One that leads in ``term``; alone until :meth:`set_backup`.

    For each input: :meth:`pass_on`, whose effects are carried out first; then the shard; then :meth:`hold`.
    """

    def __init__(self, shard: Shard, term: int) -> None:
        self.shard = shard
        self.term = term
        self.fenced = False
        """another one leads: nothing leaves any more"""
        self._backup: tuple[int, int] | None = None
        self._stream: _Stream | None = None
        self._streams = 0
        self._holding = False
        self._held: deque[tuple[int, Effect]] = deque()
        self._taken = 0
        """inputs passed on so far"""
        self._covered = 0
        """of these, what a complete follower holds"""
        self._members_version = 0

    @property
    def alone(self) -> bool:
        """Whether there is nothing to be passed on or held back."""
        return self._stream is None and not self._holding and not self.fenced

    @property
    def members_version(self) -> int:
        """As the shard has it, but for one that the follower may not know yet."""
        if not self._held:
            self._members_version = self.shard.members_version
        return self._members_version

    def document(self) -> dict[str, Any]:
        """For the coordinator. ``complete``: answers wait for the backup."""
        return {
            "role": "leader",
            "term": self.term,
            "backup": list(self._backup or ()),
            "complete": self._holding,
            "held": len(self._held),
            "fenced": self.fenced,
        }

    # ------------------------------------------------------------ inputs and what follows from them

    def pass_on(self, message: Message) -> list[Effect]:
        """An input is about to be taken."""
        stream = self._stream
        if stream is None or (passed := self._as_passed(message)) is None:
            return []
        self._taken += 1
        header, *payload = wire.encode(passed)
        assert isinstance(header, bytes)
        number, body = stream.newest + 1, payload[0] if payload else b""
        item = m.Replicate(self.term, stream.number, number, header, not payload, body)
        effects = [self._give(stream, item, memoryview(body).nbytes)]
        if not self._holding and stream.nbytes > GIVE_UP_BYTES:
            self._drop_stream()
        return effects

    def hold(self, effects: list[Effect]) -> list[Effect]:
        """Of the effects of what has been taken: those that are due now, in order. The others wait for the follower."""
        if self.fenced:
            return []
        if not self._holding or (not self._held and self._covered >= self._taken):
            return effects
        due: list[Effect] = []
        for effect in effects:
            match effect:
                case Reply() | Tell():
                    self._held.append((self._taken, effect))
                case SendWeights(peer, request, stored, previous):
                    kept, payload = Kept(), stored.payload(previous)
                    stored.being_read(kept, previous)
                    version = stored.previous_version if previous else stored.version
                    weights = m.Weights(request, stored.chunk.index, version, payload)
                    self._held.append((self._taken, SendKept(peer, weights, kept)))
                case _:
                    due.append(effect)
        return due

    def _as_passed(self, message: Message) -> Message | None:
        """What the follower is to take instead of an input; None: nothing."""
        match message:
            case m.PushPull() | m.Push() | m.PushPullHeld() | m.Init():
                return message
            case m.EndEpoch() | m.Leave() | m.Hello() | m.SetMembers():
                return message
            case m.PushPullShared() | m.PushPullStaged():
                payload: Buffer | None = self.shard.payload_of(message)
                if payload is not None:
                    if isinstance(message, m.PushPullShared) and not self._holding:
                        payload = bytearray(payload)  # the answer does not wait for the follower, and frees the memory
                    return _with_payload(message, payload)
                return message  # to be refused there as well
            case m.Pull() if self.shard.keeps_bases:
                return message  # so that it keeps the same weights, which contributions are compared with
            case m.Pull() | m.AttachMemory() | m.Stage() if not self.shard.knows(message):
                return message
        return None

    # ------------------------------------------------------------ the follower

    def set_backup(self, message: m.SetBackup) -> list[Effect]:
        """The coordinator says who the follower is. Whatever waited for another one is due now."""
        wanted = None if message.process < 0 else (message.process, message.epoch)
        if message.term != self.term or self.fenced or wanted == self._backup:
            return []
        self._backup = wanted
        self._drop_stream()
        self._holding = False
        if wanted is not None:
            self.shard.stay_home()
        due = [effect for _, effect in self._held]
        self._held.clear()
        return due

    def fence(self, message: m.Fenced) -> None:
        """Somebody knows of a newer term."""
        identity = self.shard.identity
        if (message.job, message.shard) == (identity.job, identity.shard) and message.term > self.term:
            self.fenced = True
            self._held.clear()
            self._drop_stream()

    def replicated(self, peer: Peer, message: m.Replicated) -> list[Effect]:
        """A follower says what it holds."""
        identity = self.shard.identity
        who = (message.job, message.shard, message.term, (message.process, message.epoch))
        if self.fenced or who != (identity.job, identity.shard, self.term, self._backup):
            return []
        stream = self._stream
        if stream is None:
            return self._begin(peer)
        if message.stream not in (0, stream.number):
            return []  # it has not heard of this one yet
        stream.peer = peer
        held = message.number if message.stream else 0
        if held > stream.acked:
            due = self._acknowledged(stream, held)
            return [*due, *self._more(stream)]
        if message.again or self._doubtful(stream, held):
            return [Reply(peer, item.message) for item in stream.items]
        return []

    def _begin(self, peer: Peer) -> list[Effect]:
        self._streams += 1
        reading = Reading()
        self._stream = stream = _Stream(peer, self._streams, Image(self.shard, reading).parts(), reading)
        return self._more(stream)

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.reading.done = True
            self._stream = None

    def _give(self, stream: _Stream, item: m.Item, nbytes: int) -> Effect:
        stream.newest = item.number
        stream.items.append(_Sent(item, self._taken, nbytes))
        stream.nbytes += nbytes
        return Reply(stream.peer, item)

    def _acknowledged(self, stream: _Stream, held: int) -> list[Effect]:
        taken = self._covered
        while stream.items and stream.items[0].message.number <= held:
            sent = stream.items.popleft()
            stream.nbytes -= sent.nbytes
            stream.open_parts -= isinstance(sent.message, m.ReplicaState)
            taken = sent.taken
        stream.acked, stream.doubt = held, (-1, -1)
        due: list[Effect] = []
        if stream.complete and held >= stream.complete:
            self._covered = taken
            while self._held and self._held[0][0] <= taken:
                due.append(self._held.popleft()[1])
        return due

    def _more(self, stream: _Stream) -> list[Effect]:
        """What else the follower can be told now: of the state, and that it is complete."""
        effects: list[Effect] = []
        while not stream.sent and stream.open_parts < PARTS:
            part, stream.sent = next(stream.parts)
            stream.open_parts += 1
            item = m.ReplicaState(self.term, stream.number, stream.newest + 1, stream.sent, part)
            effects.append(self._give(stream, item, memoryview(part).nbytes))
        if stream.sent and not stream.open_parts and not stream.complete:
            stream.reading.done = True
            if stream.late < 0:
                stream.late = self._taken + PATIENCE * (len(stream.items) + CLOSE_ITEMS)
            close = len(stream.items) <= CLOSE_ITEMS and stream.nbytes <= CLOSE_BYTES
            if close or self._taken >= stream.late:
                stream.complete = stream.newest + 1
                self._holding, self._covered = True, 0
                effects.append(self._give(stream, m.ReplicaComplete(self.term, stream.number, stream.complete), 0))
        return effects

    def _doubtful(self, stream: _Stream, held: int) -> bool:
        """Whether what the follower lacks must be lost: it has said the same twice, 0.5 s apart."""
        before, stream.doubt = stream.doubt, (held, stream.newest)
        lost = before[0] == held < before[1]
        if lost:
            stream.doubt = (-1, -1)
        return lost


def _with_payload(push: m.PushPullShared | m.PushPullStaged, payload: Buffer) -> m.PushPull:
    p = push
    return m.PushPull(
        p.request,
        p.job,
        p.shard_epoch,
        p.slot,
        p.worker_epoch,
        p.seq,
        p.base_version,
        p.chunk,
        p.samples,
        p.position,
        p.hyper,
        payload,
    )


class Follower:
    """One that follows, until :meth:`promote`. ``make`` gives an empty shard that serves in a term.

    ``process`` and ``epoch`` are who it is to the coordinator.
    """

    def __init__(self, make: Callable[[int], Shard], process: int, epoch: int) -> None:
        self.term = -1
        """of the leader; -1: nobody has said whom to follow"""
        self.shard = make(-1)
        self.complete = False
        """it holds whatever the leader has answered, and may be promoted"""
        self.malformed = 0
        self._make = make
        self._process = process
        self._epoch = epoch
        self._asked = -1
        self._begin(0)

    @property
    def behind(self) -> int:
        """Inputs that are held and not applied yet."""
        return len(self._inputs)

    def document(self) -> dict[str, Any]:
        """For the coordinator."""
        return {
            "role": "follower",
            "term": self.term,
            "complete": self.complete,
            "held": self._number,
            "behind": self.behind,
        }

    def follow(self, term: int) -> bool:
        """Follow the leader of this term from now on; False, and nothing changes, when that is not news."""
        if term <= self.term:
            return False
        self.term = term
        self._begin(0)
        return True

    def say(self, again: bool = False) -> m.Replicated:
        """What the leader is to be told, at least every 0.5 s."""
        identity = self.shard.identity
        return m.Replicated(
            identity.job, identity.shard, self.term, self._process, self._epoch, self._stream, self._number, again
        )

    def receive(self, messages: Iterable[Message]) -> list[Message]:
        """Take what the leader says; the answers, which are to leave before :meth:`apply`."""
        before, gap, answers = (self._stream, self._number), False, list[Message]()
        for item in messages:
            if not isinstance(item, m.Item):
                self.malformed += 1
            elif item.term < self.term:
                identity = self.shard.identity
                answers.append(m.Fenced(identity.job, identity.shard, self.term))
            elif item.term == self.term and item.stream >= self._stream:
                if item.stream > self._stream:
                    self._begin(item.stream)
                if item.number == self._number + 1:
                    self._take(item)
                else:
                    gap = gap or item.number > self._number
        if (self._stream, self._number) != before or (gap and self._asked != self._number):
            if gap:
                self._asked = self._number
            answers.append(self.say(gap))
        return answers

    def apply(self, at_most: int = KEPT_APPLIED) -> None:
        """Have the shard take inputs that are held."""
        if self._state is not None:
            return
        while self._inputs and at_most > 0:
            at_most -= 1
            message = self._inputs.popleft()
            try:
                if isinstance(message, m.SetMembers):
                    self.shard.take_members(message)
                else:
                    self.shard.handle(NOBODY, message, 0.0)
            except ProtocolError:
                self.malformed += 1

    def promote(self, term: int) -> str:
        """Apply what is held, and lead in ``term`` from now on; or why not."""
        if not self.complete:
            return "it does not hold all that has been answered"
        if term <= self.term:
            return f"term {term} is not above {self.term}"
        self.apply(len(self._inputs))
        self.term = term
        self.shard.lead(term)
        return ""

    def _begin(self, stream: int) -> None:
        self._stream = stream
        self._number = 0
        self._asked = -1
        self._inputs: deque[Message] = deque()
        self._state: Received | None = Received()
        self.complete = False

    def _take(self, item: m.Item) -> None:
        self._number = item.number
        match item:
            case m.Replicate():
                frames = [item.message] if item.bare else [item.message, item.payload]
                try:
                    self._inputs.append(wire.decode(frames, wire.CONTROL_HEADER_LIMIT))
                except ProtocolError:
                    self.malformed += 1
            case m.ReplicaState() if self._state is not None:
                self._state.take(item.payload)
                if item.last:
                    self.shard = self._make(self.term)
                    self._state.load(self.shard)
                    self._state = None
            case m.ReplicaComplete():
                self.complete = True
            case _:
                self.malformed += 1
