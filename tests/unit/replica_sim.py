"""A shard with its backup, workers and whoever decides who leads, in one process: messages are delayed, connections
break, processes die or freeze between any two of their effects. Everything follows from the seed.

``python replica_sim.py FIRST COUNT`` runs many seeds.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from unit_kit import JOB, model, payload, tensor

from downpour_common import messages as m
from downpour_common.layout import Layout, SharedLayout, plan
from downpour_common.messages import Message
from downpour_common.modes import parse_mode
from downpour_server import state
from downpour_server.dedup import Seen
from downpour_server.effects import Attach, Effect, Reply, SendKept, SendWeights, Tell
from downpour_server.replica import Follower, Leader
from downpour_server.shard import Identity, Shard
from downpour_server.snapshot import Reading
from downpour_server.state import Image

STEPS = 12
"""of each worker; in sync in two passes"""
FAULTY = 400
"""events with faults in between; then all must come to an end by itself"""
ENOUGH = 60_000
"""events after which a run is stuck"""


state.PART_BYTES, state.TOGETHER_BYTES = 1024, 64  # many parts, most of them by reference


@dataclass(slots=True)
class Flight:
    """A message under way; its payload is read when it arrives, as a network reads the sender's memory."""

    message: Message
    done: bool = False

    def land(self) -> Message:
        self.done = True
        message: Any = self.message
        return replace(message, payload=bytearray(message.payload)) if hasattr(message, "payload") else message


class Crash(Exception):
    """The process ends here."""


class Node:
    """A shard's process."""

    def __init__(self, world: World, name: str, follows: bool, term: int) -> None:
        self.world, self.name = world, name
        self.alive, self.frozen = True, False
        self.fuse = -1
        self.leads_from = ""
        self.follower = Follower(world.make, int(name[1:]), 0) if follows else None
        self.leader = None if follows else Leader(world.make(term), term)

    def step(self, source: str, message: Message) -> None:
        """Take one message; may raise :class:`Crash`."""
        self.burn()
        match message:
            case m.Item() if self.follower is not None:
                for answer in self.follower.receive([message]):
                    self.send(self.leads_from, answer)
                self.burn()
                self.follower.apply(self.world.random.choice([0, 1, 64]))
            case m.Follow() if self.follower is not None and self.leader is None:
                if self.follower.follow(message.term):
                    self.leads_from = message.address
                    self.send(self.leads_from, self.follower.say())
            case m.Promote() if self.follower is not None and self.leader is None:
                assert self.follower.promote(message.term) == ""
                self.leader = Leader(self.follower.shard, message.term)
                self.world.promoted(self)
            case m.SetBackup() if self.leader is not None:
                self.carry_out(self.leader.set_backup(message))
            case m.Replicated() if self.leader is not None:
                self.carry_out(self.leader.replicated(source.encode(), message))
            case m.Fenced() if self.leader is not None:
                self.leader.fence(message)
                self.world.tally.fenced += self.leader.fenced
            case m.SetMembers() if self.leader is not None:
                self.carry_out(self.leader.pass_on(message))
                slots = message.slots
                effects = self.leader.shard.set_members(
                    message.version, dict(zip(slots[::2], slots[1::2], strict=True))
                )
                version = self.leader.shard.members_version
                self.carry_out(self.leader.hold([*effects, Tell(m.MembersSet(JOB, 0, 0, version))]))
            case _ if self.leader is not None:
                self.carry_out(self.leader.pass_on(message))
                self.burn()
                effects = self.leader.shard.handle(source.encode(), message, 0.0)
                self.burn()
                self.carry_out(self.leader.hold(effects))

    def burn(self) -> None:
        """A place where the process may end."""
        if self.fuse >= 0:
            self.fuse -= 1
            if self.fuse < 0:
                raise Crash

    def carry_out(self, effects: list[Effect]) -> None:
        """As the shard's process does."""
        for effect in effects:
            self.burn()
            match effect:
                case Reply(peer, message):
                    self.send(peer.decode(), message)
                case SendKept(peer, weights, kept):
                    kept.sent = self.send(peer.decode(), weights)
                case SendWeights(peer, request, stored, previous):
                    version = stored.previous_version if previous else stored.version
                    weights = m.Weights(request, stored.chunk.index, version, stored.payload(previous))
                    stored.being_read(self.send(peer.decode(), weights), previous)
                case Attach():
                    assert self.leader is not None
                    worker = self.world.workers[effect.offer.slot]
                    self.carry_out(self.leader.hold(self.leader.shard.attached(effect, memoryview(worker.memory))))
                case Tell(message):
                    self.world.told(self, message)

    def send(self, target: str, message: Message) -> Flight:
        flight = Flight(message)
        self.world.links.setdefault((self.name, target), deque()).append(flight)
        if target[0] == "w":
            self.world.answered(self, self.world.workers[int(target[1:])], message)
        return flight


@dataclass(slots=True)
class Open:
    """A worker's request without an answer."""

    message: Any
    instead: Any = None


class Worker:
    """Trains: pushes to all chunks, waits for all answers, and goes on; repeats and sends again as clients do."""

    def __init__(self, world: World, slot: int) -> None:
        self.world, self.slot = world, slot
        self.name = f"w{slot}"
        self.at, self.term = "n0", 1
        self.seq = self.steps = self.epoch = 0
        self.open: dict[int, Open] = {}
        self.waiting: list[Open] = []
        self.phase = "hello"
        self.greeting = 0
        self.numbers = slot * 1_000_000
        self.weights: dict[int, torch.Tensor] = {}
        self.memory = bytearray(world.shared_layout.nbytes)
        self.attached = False
        self.acked: set[tuple[int, int]] = set()
        self.pushed: dict[int, tuple[int, int]] = {}
        """chunk and number of each request that pushes"""
        self.say(m.Hello(self.number(), JOB, slot, 0, world.layout.digest))

    @property
    def done(self) -> bool:
        return self.phase == "gone"

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def say(self, message: Any, instead: Any = None) -> None:
        self.open[message.request] = Open(message, instead)
        self.put(message)

    def put(self, message: Any) -> None:
        if isinstance(message, m.Contribution):
            self.pushed[message.request] = message.chunk, message.seq
        self.world.links.setdefault((self.name, self.at), deque()).append(Flight(message))

    # ------------------------------------------------------------ a shard that has moved

    def moved(self, message: m.ShardMoved) -> None:
        if message.shard_epoch <= self.term:
            return
        self.at, self.term, self.attached = message.address, message.shard_epoch, False
        pushes = [o.message.seq for o in (*self.open.values(), *self.waiting) if isinstance(o.message, m.Contribution)]
        self.waiting += [o for o in self.open.values() if not isinstance(o.message, (m.Hello, m.Stage, m.AttachMemory))]
        self.open.clear()
        hello = m.Hello(self.number(), JOB, self.slot, 0, self.world.layout.digest, min(pushes, default=self.seq))
        self.greeting = hello.request
        self.say(hello)

    def greeted(self) -> None:
        if self.world.shared and self.phase != "hello" and not self.attached:
            self.attach()
        waiting, self.waiting = self.waiting, []
        for entry in waiting:
            message = entry.instead or entry.message
            fields: dict[str, Any] = {"request": self.number()}
            if isinstance(message, m.Contribution):
                fields["shard_epoch"] = self.term
            self.say(replace(message, **fields))

    def attach(self) -> None:
        self.say(m.AttachMemory(self.number(), JOB, self.slot, 0, 1, 1, b"nonce", True))

    # ------------------------------------------------------------ answers

    def hear(self, source: str, message: Any) -> None:
        if source != self.at:
            return
        entry = self.open.pop(message.request, None)
        if entry is None:
            return
        asked = entry.message
        match message:
            case m.Refused(code="not-staged"):
                self.say(replace(entry.instead, request=self.number(), shard_epoch=self.term))
                return
            case m.Refused():
                raise AssertionError(f"{asked} was refused: {message}")
            case m.HelloReply():
                if self.greeting:
                    self.greeting = 0
                    self.greeted()
                if self.phase == "hello":
                    self.seq = message.clock
                    self.phase = "init"
                    for chunk in self.world.layout.chunks if self.slot == 0 else ():
                        first = payload(torch.zeros(chunk.numel, dtype=torch.float64))
                        self.say(m.Init(self.number(), JOB, 0, 0, chunk.index, first))
            case m.Weights():
                self.weights[message.chunk] = torch.frombuffer(bytearray(message.payload), dtype=torch.float64)
                if not self.world.synchronous:
                    assert self.weights[message.chunk].sum() == message.version, "weights of another version"
            case m.WeightsShared():
                at = self.world.shared_layout.weights(self.world.layout.chunks[message.chunk])
                self.weights[message.chunk] = torch.frombuffer(bytearray(self.memory[at]), dtype=torch.float64)
            case m.Ack():
                self.attached = self.attached or isinstance(asked, m.AttachMemory)
                if isinstance(asked, m.EndEpoch):
                    self.seq = message.version
            case _:
                pass
        if isinstance(asked, m.Contribution):
            self.acked.add((asked.chunk, asked.seq))
            if not self.world.synchronous and isinstance(asked, m.PushPull | m.PushPullStaged | m.PushPullShared):
                own = self.weights[asked.chunk][self.world.place(self.slot, asked.seq)]
                assert own == 1.0, f"an answer to {asked.seq} of {self.slot} has it {own} times"
        if not self.open and not self.waiting and not self.greeting:
            self.go_on()

    def go_on(self) -> None:
        if self.phase == "init":
            self.phase = "pull"
            if self.world.shared and not self.attached:
                self.attach()
            self.pull()
        elif self.phase in ("pull", "step"):
            ends = (
                self.world.synchronous and self.phase == "step" and self.steps == self.world.ends(self.slot, self.epoch)
            )
            if ends:
                self.phase = "end"
                self.epoch += 1
                self.say(m.EndEpoch(self.number(), JOB, self.slot, 0, 0, self.epoch - 1))
            elif self.steps == self.world.ends(self.slot, 1):
                self.phase = "leave"
                self.say(m.Leave(self.number(), JOB, self.slot, 0, self.seq))
            else:
                self.phase = "step"
                self.push()
        elif self.phase == "end":
            self.phase = "pull"
            self.pull()
        elif self.phase == "leave":
            self.phase = "gone"

    def pull(self) -> None:
        for chunk in self.world.layout.chunks:
            self.say(m.Pull(self.number(), JOB, self.slot, 0, chunk.index))

    def push(self) -> None:
        draw = self.world.random
        plain = not self.attached and draw.random() < 0.2 and not self.world.synchronous
        for chunk in self.world.layout.chunks:
            gradient = self.world.gradient(self.slot, self.seq, self.weights[chunk.index])
            fields = (JOB, self.term, self.slot, 0, self.seq, 0, chunk.index, 1 + self.slot, (0, self.seq), b"")
            body = payload(gradient)
            if self.attached:
                self.memory[self.world.shared_layout.gradient(chunk)] = body
                self.say(m.PushPullShared(self.number(), *fields), m.PushPull(0, *fields, body))
            elif draw.random() < 0.2:
                stage = m.Stage(self.number(), JOB, self.slot, 0, chunk.index, body)
                self.put(stage)
                stale = draw.random() < 0.3
                full = m.PushPull(0, *fields, body)
                self.say(m.PushPullStaged(self.number(), *fields, stage.request - stale, b""), full)
            else:
                kind = m.Push if plain else m.PushPull
                push = kind(self.number(), *fields, body)
                self.say(push)
                if draw.random() < 0.1:  # a repeat, whose answer nobody waits for
                    self.put(replace(push, request=self.number()))
        self.seq += 1
        self.steps += 1


@dataclass(slots=True)
class Tally:
    """What happened in a run."""

    killed: int = 0
    zombies: int = 0
    followers: int = 0
    torn: int = 0
    events: int = 0
    woken: int = 0
    fenced: int = 0
    """woken, and told so"""
    late: int = 0
    """answers of those who lead no more"""


class World:
    """One run."""

    def __init__(self, seed: int, mode: str, workers: int, faults: bool = True, shared: bool = False) -> None:
        self.random = random.Random(f"{seed} {mode} {workers} {shared}")
        self.mode, self.count, self.shared, self.faults = mode, workers, shared, faults
        self.synchronous = mode == "sync"
        self.layout = layout_for(mode)
        self.shared_layout = SharedLayout(self.layout)
        self.tally = Tally()
        self.links: dict[tuple[str, str], deque[Flight]] = {}
        self.nodes: dict[str, Node] = {}
        self.term = 1
        self.leader = "n0"
        self.backup = ""
        self.members = 0
        self.promoting = False
        self.nodes["n0"] = Node(self, "n0", False, 1)
        self.workers = [Worker(self, slot) for slot in range(workers)]
        if faults:
            self.start_follower()

    def make(self, term: int) -> Shard:
        return Shard(
            Identity(JOB, 0, term), self.layout, parse_mode(self.mode), self.count, 10.0, keep_previous=self.synchronous
        )

    def ends(self, slot: int, epoch: int) -> int:
        """Steps that a worker has taken at the end of a pass: not the same for all."""
        return (STEPS // 2 - slot % 2) * (epoch + 1)

    def place(self, slot: int, seq: int) -> int:
        return slot * STEPS + seq

    def gradient(self, slot: int, seq: int, weights: torch.Tensor) -> torch.Tensor:
        if self.synchronous:
            return weights * 0.3 + torch.sin(torch.arange(len(weights), dtype=torch.float64) * (slot + 1) + seq)
        hot = torch.zeros(len(weights), dtype=torch.float64)
        hot[self.place(slot, seq)] = 1.0
        return hot

    # ------------------------------------------------------------ who decides

    def tell(self, name: str, message: Message) -> None:
        self.links.setdefault(("c", name), deque()).append(Flight(message))

    def start_follower(self) -> None:
        name = f"n{len(self.nodes)}"
        self.nodes[name] = Node(self, name, True, 0)
        self.backup = name
        self.tell(self.leader, m.SetBackup(self.term, int(name[1:]), 0))
        self.tell(name, m.Follow(self.term, self.leader))

    def lose_follower(self) -> None:
        self.tell(self.leader, m.SetBackup(self.term, -1, -1))
        self.start_follower()

    def begin_promotion(self) -> None:
        self.term += 1
        self.leader, self.backup, self.promoting = self.backup, "", True
        self.tell(self.leader, m.Promote(self.term))

    def promoted(self, node: Node) -> None:
        self.promoting = False
        for worker in self.workers:
            for chunk, seq in worker.acked:
                self.check_seen(node, worker.slot, chunk, seq)
            self.links.setdefault(("c", worker.name), deque()).append(Flight(m.ShardMoved(0, self.term, node.name)))
        self.start_follower()
        self.set_members()

    def set_members(self) -> None:
        self.members += 1
        slots = tuple(x for w in self.workers for x in (w.slot, 0))
        self.tell(self.leader, m.SetMembers(self.members, slots))

    def told(self, node: Node, message: Message) -> None:
        """A leader's word to the coordinator counts only if whoever leads knows the same."""
        if isinstance(message, m.MembersSet) and not self.promoting:
            leader = self.nodes[self.leader].leader
            assert leader is not None
            assert node.name != self.leader or leader.shard.members_version >= message.version

    def answered(self, node: Node, worker: Worker, message: Any) -> None:
        """What anybody acknowledges, whoever leads by now has."""
        leader = self.nodes[self.leader]
        if isinstance(message, m.Refused) or message.request not in worker.pushed or leader.leader is None:
            return
        self.tally.late += node is not leader
        self.check_seen(leader, worker.slot, *worker.pushed[message.request])

    def check_seen(self, node: Node, slot: int, chunk: int, seq: int) -> None:
        assert node.leader is not None
        known = node.leader.shard.chunks[chunk]._windows.get(slot)
        seen = Seen.NEW if known is None else known[1].look(seq)
        assert seen is not Seen.NEW, f"{(slot, chunk, seq)} was answered, and is lost"

    @property
    def safe(self) -> bool:
        """Whether the leader may be lost now."""
        node = self.nodes.get(self.backup)
        named = not any(isinstance(f.message, m.SetBackup) for f in self.links.get(("c", self.leader), ()))
        follower = node.follower if node is not None and node.alive and not node.frozen else None
        return not self.promoting and named and follower is not None and follower.complete

    # ------------------------------------------------------------ running

    def run(self) -> None:
        while not self.quiet:
            self.tally.events += 1
            assert self.tally.events < ENOUGH, f"stuck: {[(w.phase, w.steps, len(w.open)) for w in self.workers]}"
            self.turn()
        self.check_end()

    @property
    def quiet(self) -> bool:
        if not all(w.done for w in self.workers) or self.promoting:
            return False
        node = self.nodes.get(self.backup)
        return not self.faults or bool(node is not None and node.follower and node.follower.complete)

    def turn(self) -> None:
        draw = self.random
        if self.faults and self.tally.events < FAULTY and draw.random() < 0.06:
            self.fault()
        names = [
            link
            for link, flights in self.links.items()
            if flights and not (link[1] in self.nodes and self.stands(link[1]))
        ]
        if not names or draw.random() < 0.02:
            self.heartbeats()
        if names:
            source, target = draw.choice(names)
            self.deliver(source, target, self.links[source, target].popleft().land())

    def stands(self, name: str) -> bool:
        return self.nodes[name].frozen

    def deliver(self, source: str, target: str, message: Message) -> None:
        if target in self.nodes:
            node = self.nodes[target]
            if node.alive:
                try:
                    node.step(source, message)
                except Crash:
                    self.killed(node)
        elif isinstance(message, m.ShardMoved):
            self.workers[int(target[1:])].moved(message)
        else:
            self.workers[int(target[1:])].hear(source, message)

    def heartbeats(self) -> None:
        for node in self.nodes.values():
            if node.alive and not node.frozen and node.follower is not None and node.leader is None and node.leads_from:
                node.follower.apply()
                node.send(node.leads_from, node.follower.say())

    def fault(self) -> None:
        draw, leader = self.random, self.nodes[self.leader]
        kinds = ["kill", "zombie", "wake", "follower", "abandon", "cut", "members"]
        [kind] = draw.choices(kinds, [8, 4, 3, 1, 1, 2, 1])
        if kind == "kill" and self.safe:
            leader.fuse = draw.randrange(12)
        elif kind == "zombie" and self.safe and not self.shared and leader.fuse < 0:
            leader.frozen = True
            self.tally.zombies += 1
            self.begin_promotion()
        elif kind == "wake":
            for node in self.nodes.values():
                if node.frozen:
                    node.frozen = False
                    self.tally.woken += 1
        elif kind == "follower" and self.backup and leader.fuse < 0 and not self.promoting:
            self.nodes[self.backup].alive = False
            self.tally.followers += 1
            self.cut_from(self.backup)
            self.lose_follower()
        elif kind == "abandon" and self.backup and leader.fuse < 0 and not self.promoting:
            self.lose_follower()
        elif kind == "cut" and self.backup:
            self.tally.torn += 1
            for link in ((self.leader, self.backup), (self.backup, self.leader)):
                self.cut(link)
        elif kind == "members" and not self.promoting:
            self.set_members()

    def cut_from(self, name: str) -> None:
        for link in list(self.links):
            if link[0] == name:
                self.cut(link)

    def cut(self, link: tuple[str, str]) -> None:
        """A connection breaks: what was sent last is lost."""
        flights = self.links.get(link, deque())
        for _ in range(self.random.randint(0, len(flights))):
            flights.pop().done = True

    def killed(self, node: Node) -> None:
        """A fuse burnt down. If it is not safe any more to lose this one, the fuse comes too late: see ``safe``."""
        node.alive = False
        self.tally.killed += 1
        self.cut_from(node.name)
        assert node.name == self.leader
        self.begin_promotion()

    # ------------------------------------------------------------ what must hold

    def check_end(self) -> None:
        leader = self.nodes[self.leader].leader
        assert leader is not None
        shard = leader.shard
        for worker in self.workers:
            for chunk, seq in worker.acked:
                self.check_seen(self.nodes[self.leader], worker.slot, chunk, seq)
        if not self.synchronous:
            for stored in shard.chunks.values():
                wanted = torch.zeros(stored.chunk.numel, dtype=torch.float64)
                for w in self.workers:
                    for seq in range(self.ends(w.slot, 1)):
                        wanted[self.place(w.slot, seq)] += 1.0
                assert torch.equal(stored.weights, wanted), (stored.weights, wanted)
        if self.faults:
            self.check_same()

    def check_same(self) -> None:
        """The follower, once it has all, is what the leader is."""
        follower, leader = self.nodes[self.backup].follower, self.nodes[self.leader].leader
        assert follower is not None
        assert leader is not None
        self.nodes[self.leader].fuse = -1
        for _ in range(50):
            self.heartbeats()
            for link in [(self.leader, self.backup), (self.backup, self.leader), ("c", self.leader)]:
                flights = self.links.get(link, deque())
                while flights:
                    self.deliver(*link, flights.popleft().land())
        follower.apply(1 << 30)
        assert describe(follower.shard) == describe(leader.shard)
        assert not leader._held, "something is held back for ever"


def describe(shard: Shard) -> dict[str, Any]:
    """All that is carried, but for what is only counted."""
    shard.stats = type(shard.stats)()
    image = Image(shard, Reading(True))
    return {"head": image._head, "tensors": [t.tolist() for t in image._tensors]}


@cache
def layout_for(mode: str) -> Layout:
    """Two chunks."""
    options = ({"lr": 0.05, "betas": [0.9, 0.99]},)
    spec = model(tensor("w", 96, dtype="float64"), rule="Adam", options=options)
    if mode != "sync":
        spec = model(tensor("w", 96, dtype="float64"))
    return plan(spec, 1, 512)


@cache
def reference(mode: str, workers: int) -> list[list[float]]:
    """Final weights of a run in which nothing fails."""
    world = World(0, mode, workers, faults=False)
    world.run()
    return weights_of(world)


def weights_of(world: World) -> list[list[float]]:
    """As whoever leads has them."""
    leader = world.nodes[world.leader].leader
    assert leader is not None
    return [stored.weights.tolist() for stored in leader.shard.chunks.values()]


def run_seed(seed: int) -> Tally:
    """One run with faults; raises :class:`AssertionError` where something does not hold."""
    mode = ("async", "sync", "ssp:1")[seed % 3]
    workers = 2 + seed // 3 % 2
    shared = seed // 6 % 3 == 0
    world = World(seed, mode, workers, shared=shared)
    try:
        world.run()
        if mode == "sync":
            assert weights_of(world) == reference(mode, workers), "not the weights of a run without faults"
    except BaseException as problem:
        raise AssertionError(f"seed {seed} ({mode}, {workers} workers{', shared' * shared}): {problem}") from problem
    return world.tally


def main(first: int, count: int) -> None:
    total = Tally()
    for seed in range(first, first + count):
        tally = run_seed(seed)
        for name in Tally.__slots__:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    print(count, "seeds:", total)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    main(int(sys.argv[1]), int(sys.argv[2]))
