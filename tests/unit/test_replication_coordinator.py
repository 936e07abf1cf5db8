"""The coordinator's side of replication: who leads, who may, what is told to whom, whatever dies in between."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from coordinator_kit import MODEL, shard_entry, spec_of, through_json

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.names import process_name, server_index
from downpour_coordinator.cluster import JobRecord, start_document
from downpour_coordinator.effects import FindCheckpoint, FindShardCheckpoint, LogRow, Send, StorePart
from downpour_coordinator.facts import facts_for
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.phases import Phase
from downpour_coordinator.placement import Room, place, place_gang
from downpour_coordinator.reports import check_report
from downpour_coordinator.snapshots import CommitSnapshot
from downpour_coordinator.standby import BACKUP_FROZEN_S, LEADER_FROZEN_S, WITHOUT_S

JOB = "job-1"


@dataclass
class Server:
    """A server process as far as terms, roles and what is held go; see ``downpour_server.replica``."""

    index: int
    epoch: int
    follows: bool
    term: int
    address: str = ""
    ready: bool = False
    frozen: bool = False
    log: list[int] = field(default_factory=list)
    """pushes that it has, in order"""
    backup: tuple[int, int] | None = None
    holding: bool = False
    complete: bool = False
    members: int = 0
    waiting: list[int] = field(default_factory=list)
    """pushes that are not acknowledged yet"""
    fenced: bool = False
    restored: bool = False

    @property
    def replica(self) -> dict[str, Any]:
        """As in a report."""
        if self.follows:
            return {"role": "follower", "term": self.term, "complete": self.complete, "held": 0, "behind": 0}
        backup = list(self.backup or ())
        held = len(self.waiting)
        return {"role": "leader", "term": self.term, "backup": backup, "complete": self.holding, "held": held}


class Model:
    """A lifecycle, servers that replicate as they should, and workers that push to whom they take for the leader.

    ``acknowledged``: by shard, what workers were told is there. Messages arrive in order on each way, any time later.
    A restart of the coordinator begins with what it had made durable before it last said something.
    """

    def __init__(self, seed: int = 0, shards: int = 2, mode: str = "async", **fields: Any) -> None:
        self.lot = random.Random(seed)
        self.spec = spec_of(2, shards, mode, replication=2, **fields)
        self.life = Lifecycle(JOB, self.spec, facts_for(JOB, self.spec, None, ""), "")
        self.now_s = 100.0
        self.servers: dict[int, Server] = {}
        self.workers: set[int] = set()
        self.frozen: set[int] = set()
        self.up: deque[tuple[bytes, m.Message]] = deque()
        self.down: dict[bytes, deque[m.Message]] = {}
        self.known: dict[int, list[tuple[int, str]]] = {}
        """by worker, by shard: term and address"""
        self.acknowledged: list[list[int]] = [[] for _ in range(shards)]
        self.pushes = 0
        self.journal: Any = None
        self.rows: list[dict[str, Any]] = []
        self.committed: list[int] = []
        self.sought: list[Any] = []
        self.asked = 0
        self.carry_out(self.life.begin(self.now_s))
        self.save()
        self.place()

    # ------------------------------------------------------------ the coordinator

    def save(self) -> None:
        self.journal = through_json(self.life.document())

    def carry_out(self, effects: Any) -> None:
        """As the coordinator's daemon: it is durable before anything is said."""
        if effects:
            self.save()
        for effect in effects:
            match effect:
                case Send(peer, message) if peer:
                    self.down.setdefault(peer, deque()).append(message)
                case LogRow(row):
                    self.rows.append(row)
                case CommitSnapshot(number):
                    self.committed.append(number)
                    self.carry_out(self.life.snapshot_done(number, "", self.now_s))
                case FindShardCheckpoint() | FindCheckpoint():
                    self.sought.append(effect)
                case StorePart():
                    raise AssertionError

    def restarted(self) -> None:
        """Another process goes on from the journal; what had not been read is lost."""
        model = self.life.training.model
        self.life = Lifecycle.from_document(JOB, self.journal, model, self.now_s)
        self.up.clear()
        for line in self.down.values():
            line.clear()

    def tick(self, seconds: float = 0.25) -> None:
        self.now_s += seconds
        self.carry_out(self.life.tick(self.now_s))
        self.obey()
        self.place()

    def place(self) -> None:
        for process in self.life.pending():
            self.life.placed(process.role, process.index, "node", self.now_s)
            self.save()
            if process.role == "worker":
                self.workers.add(process.index)
            else:
                training = self.life.training
                term = training.shards[process.index % self.spec.shards].term
                follows = training.follows(process.index)
                address = f"{process.index}.{process.epoch}"
                self.servers[process.index] = Server(process.index, process.epoch, follows, term, address)
        self.register()

    def register(self) -> None:
        for server in self.servers.values():
            if not server.ready and not server.frozen:
                self.hear(server, m.RegisterShard(JOB, server.index, server.epoch, 1, server.address))
        for slot in self.workers:
            if slot not in self.known:
                register = m.RegisterWorker(1, JOB, slot, 0, 1, MODEL.to_wire())
                self.up.append((b"worker %d" % slot, register))

    def obey(self) -> None:
        for process in self.life.stopping():
            if process.role == "server" and process.stop == 0.0:
                self.dies(process.index)

    def dies(self, index: int, code: int = -9) -> None:
        """The process of a server ends; the coordinator hears of it at once (its carrier repeats that until it has)."""
        server = self.servers.pop(index)
        self.carry_out(self.life.ended(("server", index), server.epoch, code, self.now_s))
        self.save()

    # ------------------------------------------------------------ messages

    def hear(self, server: Server, message: m.Message) -> None:
        if not server.frozen:
            self.up.append((f"{server.index} {server.epoch}".encode(), message))

    def reports(self) -> None:
        for server in self.servers.values():
            document = {"ready": server.ready, "members": server.members, "initialised": True, "pid": 1}
            document |= {"address": server.address, "replica": server.replica if server.ready else {}}
            self.hear(server, m.ShardReport(JOB, server.index, server.epoch, document))
        for slot, shards in self.known.items():
            terms = tuple(term for term, _ in shards)
            progress = m.Progress(JOB, slot, 0, 1, 0, 0, 0, 0, 0, 0, 0.0, terms)
            self.up.append((b"worker %d" % slot, progress))

    def deliver_up(self) -> None:
        peer, message = self.up.popleft()
        if self.life.phase in (Phase.WAITING, Phase.OVER, Phase.QUEUED):
            return
        effects = self.life.handle(peer, message, self.now_s)
        if not isinstance(message, m.ShardReport | m.Progress):
            self.save()
        self.carry_out(effects)

    def deliver_down(self, peer: bytes) -> None:
        message = self.down[peer].popleft()
        if peer.startswith(b"worker"):
            self.worker_hears(int(peer.split()[1]), message)
            return
        index, epoch = map(int, peer.split())
        server = self.servers.get(index)
        if server is not None and server.epoch == epoch and not server.frozen:
            self.server_hears(server, message)

    def worker_hears(self, slot: int, message: m.Message) -> None:
        match message:
            case m.Welcome():
                self.known.setdefault(slot, [(0, address) for address in message.shards])
            case m.ShardMoved() if slot in self.known and message.shard_epoch > self.known[slot][message.shard][0]:
                self.known[slot][message.shard] = (message.shard_epoch, message.address)

    def server_hears(self, server: Server, message: m.Message) -> None:
        me = (JOB, server.index, server.epoch)
        match message:
            case m.SetUpShard():
                server.ready, server.restored = True, message.recovers
                self.hear(server, m.ShardReady(*me, ""))
            case m.SetMembers() if not server.follows:
                server.members = max(server.members, message.version)
                self.hear(server, m.MembersSet(*me, server.members))
            case m.SetBackup() if not server.follows and message.term == server.term and not server.fenced:
                wanted = None if message.process < 0 else (message.process, message.epoch)
                if wanted != server.backup:
                    server.backup, server.holding = wanted, False
                    self.acknowledge(server)
            case m.Follow() if server.follows and message.term > server.term:
                server.term, server.complete, server.log = message.term, False, []
            case m.Promote():
                error = ""
                if server.follows:
                    error = "" if server.complete and message.term > server.term else "it cannot"
                    if not error:
                        server.follows, server.term = False, message.term
                elif server.term != message.term:
                    error = "another term"
                self.hear(server, m.Promoted(*me, message.term, error))
            case m.TakeSnapshot() if not server.follows:
                entry = shard_entry(server.index % self.spec.shards)
                self.hear(server, m.SnapshotTaken(*me, message.snapshot, "", entry))

    # ------------------------------------------------------------ pushes

    def follower_of(self, leader: Server) -> Server | None:
        """The process that a leader streams to, if it listens to it."""
        if leader.backup is None:
            return None
        server = self.servers.get(leader.backup[0])
        ok = server is not None and server.epoch == leader.backup[1] and not server.frozen and server.ready
        return server if ok and server is not None and server.follows and server.term == leader.term else None

    def replicate(self, leader: Server) -> None:
        """The next thing that happens between a leader and its follower."""
        follower = self.follower_of(leader)
        if leader.follows or leader.frozen or follower is None:
            return
        follower.log = list(leader.log)
        if not leader.holding:
            leader.holding = True
        else:
            follower.complete = True
            self.acknowledge(leader)

    def acknowledge(self, leader: Server) -> None:
        shard = leader.index % self.spec.shards
        if not leader.holding or self.follower_of(leader) is not None:
            self.acknowledged[shard] += leader.waiting
            leader.waiting.clear()

    def push(self, shard: int) -> None:
        """A worker pushes; what it is answered must be there for ever."""
        if not self.known:
            return
        term, address = self.known[self.lot.choice(sorted(self.known))][shard]
        leader = next((s for s in self.servers.values() if s.address == address), None)
        if leader is None or leader.frozen or leader.follows or not leader.ready:
            return
        assert term in (0, leader.term) or leader.restored
        self.pushes += 1
        leader.log.append(self.pushes)
        leader.waiting.append(self.pushes)
        if (follower := self.follower_of(leader)) is not None and leader.holding:
            follower.log.append(self.pushes)
        self.acknowledge(leader)

    def check(self) -> None:
        """Whoever leads has all that was acknowledged."""
        for shard, entry in self.life.training.shards.items():
            server = self.servers.get(entry.process)
            if server is not None and server.epoch == entry.epoch and not entry.recovers:
                assert set(self.acknowledged[shard]) <= set(server.log), f"server/{shard} has lost pushes"

    def settle(self, rounds: int = 12) -> None:
        """Everything that can happen without faults happens."""
        for _ in range(rounds):
            self.tick(0.1)
            self.reports()
            while self.up or any(self.down.values()):
                while self.up:
                    self.deliver_up()
                for peer, line in list(self.down.items()):
                    while line:
                        self.deliver_down(peer)
            for server in list(self.servers.values()):
                self.replicate(server)
            self.check()

    def start(self) -> Model:
        self.settle()
        assert self.life.phase is Phase.TRAINING
        assert all(backup.promotable for backup in self.life.training.backups.values())
        return self

    def push_everywhere(self) -> None:
        """A push to each shard is answered."""
        for shard in range(self.spec.shards):
            before = len(self.acknowledged[shard])
            self.push(shard)
            assert len(self.acknowledged[shard]) > before, self.life.degraded


# ---------------------------------------------------------------- one after the other


def test_training_begins_with_backups_that_have_caught_up() -> None:
    model = Model()
    model.settle(1)
    assert not model.life.training.begun
    assert model.life.waiting_for() == ["server/0b", "server/1b"]
    model.start()
    assert model.life.degraded == ""
    assert [row["backup"] for row in model.rows if "backup" in row] in (
        ["server/0b", "server/1b"],
        ["server/1b", "server/0b"],
    )
    parts = {("leader", 0): ("server", 0), ("backup", 0): ("server", 2)}
    assert parts.items() <= model.life.training.parts().items()


def test_without_a_backup_it_begins_later_and_says_so() -> None:
    model = Model()
    model.servers[2].frozen = True
    model.settle()
    assert not model.life.training.begun
    assert model.life.waiting_for() == ["server/0b"]
    for _ in range(int(WITHOUT_S) + 2):
        model.settle(10)
    assert model.life.phase is Phase.TRAINING
    assert model.life.degraded == "server/0 has no backup (server/0b is catching up)"
    model.push_everywhere()


@pytest.mark.parametrize("mode", ["async", "ssp:2", "sync"])
def test_a_leader_dies_and_nothing_is_lost_and_nothing_spent(mode: str) -> None:
    model = Model(mode=mode).start()
    model.push_everywhere()
    model.dies(0)
    assert model.life.degraded.startswith("server/0b takes over as server/0's leader; server/0 has no backup")
    model.settle()
    assert model.life.degraded == ""
    assert model.life.warnings == ["server/0 killed by signal 9 (SIGKILL); server/0b leads now"]
    assert (model.life.restarts, model.life.phase) == (0, Phase.TRAINING)
    model.push_everywhere()
    assert model.servers[0].follows
    assert model.servers[0].complete
    model.dies(2)
    model.settle()
    model.push_everywhere()
    assert not model.servers[0].follows
    assert {row["leads"]: row["term"] for row in model.rows if "leads" in row} == {"server/0b": 2, "server/0": 3}


def test_a_backup_dies_and_the_leader_goes_on_alone_at_once() -> None:
    model = Model().start()
    leader = model.servers[0]
    model.dies(2)
    model.push(0)
    assert leader.waiting
    assert [s for s in model.down[b"0 0"] if isinstance(s, m.SetBackup)] == [m.SetBackup(1, -1, -1)]
    model.deliver_down(b"0 0")
    assert not leader.waiting
    model.settle()
    assert leader.backup == (2, 1)
    assert model.life.degraded == ""


def test_a_backup_that_was_given_up_is_never_promoted() -> None:
    model = Model().start()
    model.servers[2].frozen = True
    for _ in range(5):
        model.push(0)
        model.settle(int(BACKUP_FROZEN_S * 3))
    assert "server/0b has not been heard of for 3 s; it is ended" in model.life.warnings
    assert model.life.training.backups[0].promotable, "the next one has caught up"
    assert model.servers[2].epoch == 1
    model.push_everywhere()


def test_not_even_if_the_leader_dies_before_it_has_ended() -> None:
    model = Model(restarts=2).start()
    model.obey = lambda: None  # type: ignore[method-assign]
    model.servers[2].frozen = True
    for _ in range(5):
        model.push(0)
        model.settle(int(BACKUP_FROZEN_S * 3))
    assert model.life.training.backups[0].given_up
    assert not model.servers[0].waiting
    model.servers[2].frozen = False
    model.reports()  # it says that it is complete, and believes it
    while model.up:
        model.deliver_up()
    model.dies(0)
    assert model.life.training.shards[0].process == 0, "it has not been promoted"
    assert model.life.restarts == 1


def test_that_a_backup_may_lead_is_durable_before_anything_follows_from_it() -> None:
    model = Model(shards=1).start()
    model.dies(1)
    model.tick(0.1)
    while not all(backup.promotable for backup in model.life.training.backups.values()):
        model.tick(0.1)
        model.reports()
        while model.up:
            model.deliver_up()
            if all(backup.promotable for backup in model.life.training.backups.values()):
                break
            for peer, line in list(model.down.items()):
                while line:
                    model.deliver_down(peer)
        for server in model.servers.values():
            model.replicate(server)
    model.restarted()
    assert model.life.training.backups[0].promotable


def test_what_was_complete_in_an_older_term_is_not_complete() -> None:
    model = Model(restarts=1).start()
    for _ in range(20):
        model.settle(2)
    model.life.training.backups[0].promotable = False  # as if its report had not come yet
    model.dies(0)
    assert model.life.training.shards[0].recovers
    model.reports()
    while model.up:
        model.deliver_up()
    assert not model.life.training.backups[0].promotable
    model.acknowledged[0].clear()
    model.carry_out(model.life.shard_checkpoint_found(model.committed[-1], (0,), (), model.now_s))
    model.settle()
    assert model.life.degraded == ""
    assert model.servers[2].follows
    model.push_everywhere()


def test_a_frozen_leader_is_ended_before_another_leads() -> None:
    model = Model().start()
    model.servers[1].frozen = True
    model.settle(int(LEADER_FROZEN_S * 10) + 20)
    assert "server/1 has not been heard of for 5 s; it is ended" in model.life.warnings
    assert not model.servers[3].follows
    model.push_everywhere()


def test_a_coordinator_that_was_away_blames_nobody() -> None:
    model = Model().start()
    model.now_s += 60.0
    model.tick(0.1)
    assert model.life.stopping() == []
    model.settle()
    assert model.life.warnings == []


def test_both_are_gone_and_the_shard_comes_back_from_a_checkpoint_in_a_higher_term() -> None:
    model = Model(restarts=1).start()
    for _ in range(20):
        model.settle(2)
    assert model.committed
    model.dies(0)
    model.dies(2)
    assert (model.life.restarts, model.life.phase) == (1, Phase.TRAINING)
    assert isinstance(model.sought[-1], FindShardCheckpoint)
    assert model.sought[-1].shards == (0,)
    model.acknowledged[0].clear()
    model.carry_out(model.life.shard_checkpoint_found(model.committed[-1], (0,), (), model.now_s))
    model.settle()
    assert model.life.degraded == ""
    assert model.life.training.shards[0].term == 3
    assert (model.servers[2].restored, model.servers[0].follows) == (True, True)
    model.push_everywhere()


def test_in_sync_both_are_gone_and_the_whole_job_begins_again_with_fresh_epochs() -> None:
    model = Model(mode="sync", restarts=1).start()
    model.dies(0)
    model.settle()
    model.dies(2)
    model.dies(0)
    assert model.life.failure is not None
    assert (model.life.failure.role, model.life.failure.index) == ("server", 0)
    terms = {index: shard.term for index, shard in model.life.training.shards.items()}
    for _ in range(40):
        model.tick()
        for process in model.life.stopping():
            model.life.ended(process.key, process.epoch, 0, model.now_s)
    assert model.life.phase is Phase.WAITING
    model.servers.clear()
    model.carry_out(model.life.checkpoint_found(model.life.training.facts, model.now_s))
    model.known.clear()
    model.carry_out(model.life.begin(model.now_s))
    assert model.life.processes["server", 0].epoch == 2
    assert all(shard.term > terms[index] for index, shard in model.life.training.shards.items())


def test_a_snapshot_under_way_begins_again_when_its_leader_dies() -> None:
    model = Model(restarts=1).start()
    model.life.checkpoint_now("mine")
    model.tick(0.1)
    number = model.life.training.snapshot
    assert number
    model.dies(1)
    assert model.life.training.snapshot == 0
    model.settle()
    assert number not in model.committed
    assert max(model.committed) > number


@pytest.mark.parametrize("phase", [Phase.SAVING, Phase.KEEPING])
def test_a_leader_dies_while_the_last_checkpoint_is_made(phase: Phase) -> None:
    model = Model().start()
    if phase is Phase.KEEPING:
        model.carry_out(model.life.stop("INTERRUPTED", keep=True, now_s=model.now_s))
    else:
        for slot in (0, 1):
            model.up.append((b"worker %d" % slot, m.Goodbye(9, JOB, slot, 0, False, 0)))
        while model.up:
            model.deliver_up()
        for slot in (0, 1):
            model.carry_out(model.life.ended(("worker", slot), 0, 0, model.now_s))
    assert model.life.phase is phase
    model.dies(0)
    model.known.clear()
    model.settle(3)
    assert model.committed


def test_what_a_shards_file_is_called_does_not_depend_on_who_leads() -> None:
    model = Model().start()
    model.dies(1)
    model.settle()
    model.life.checkpoint_now("mine")
    model.tick(0.1)
    part = m.SnapshotPart(5, JOB, 3, 0, model.life.training.snapshot, "shard-1.safetensors", 0, b"x")
    (stored,) = model.life.handle(b"3 0", part, model.now_s)
    assert isinstance(stored, StorePart)
    assert stored.part.shard == 1


# ---------------------------------------------------------------- anything at any time


@pytest.mark.parametrize("seed", range(30))
def test_nothing_that_was_acknowledged_is_lost_whatever_dies_when(seed: int) -> None:
    """Leaders and backups die, freeze, and the coordinator is started again, at any moment. A leader only dies for good
    while the coordinator, or whoever goes on from its journal, knows a backup that can take over: else it is a failure
    of both, of which the job must say so."""
    model = Model(seed, shards=1 + seed % 2).start()
    lot = model.lot
    for _ in range(600):
        match lot.choice(("push", "push", "push", "up", "up", "down", "down", "replicate", "tick", "report", "fault")):
            case "push":
                model.push(lot.randrange(model.spec.shards))
            case "up" if model.up:
                model.deliver_up()
            case "down" if lines := sorted(peer for peer, line in model.down.items() if line):
                model.deliver_down(lot.choice(lines))
            case "replicate" if model.servers:
                model.replicate(model.servers[lot.choice(sorted(model.servers))])
            case "tick":
                model.tick(lot.choice((0.05, 0.3)))
            case "report":
                model.reports()
                model.register()
            case "fault":
                fault(model, lot)
        model.check()
        if model.life.phase is not Phase.TRAINING:
            raise AssertionError(model.life.failure)
    for server in model.servers.values():
        server.frozen = False
    for _ in range(40):  # some are started again later and later
        model.tick(2.0)
        model.settle(3)
    assert model.life.degraded == ""
    model.push_everywhere()
    assert model.life.restarts == 0


def fault(model: Model, lot: random.Random) -> None:
    if lot.random() < 0.3:
        model.restarted()
        return
    index = lot.choice(sorted(model.servers)) if model.servers else -1
    if index < 0:
        return
    shard = model.life.training.shards[index % model.spec.shards]
    backup = model.life.training.backups.get(shard.index)
    if index == shard.process and (backup is None or not backup.promotable or not alive(model, backup.process)):
        return
    if index != shard.process and not alive(model, shard.process):
        return
    if index != shard.process and model.servers[shard.process].frozen:
        return
    if lot.random() < 0.15:
        model.servers[index].frozen = True
    else:
        model.dies(index)


def alive(model: Model, index: int) -> bool:
    return index in model.servers and not model.servers[index].frozen


# ---------------------------------------------------------------- places, orders, names


def rooms(**hosts: str) -> list[Room]:
    return [Room(node, "server", {}, -1, 1 << 40, host=host) for node, host in hosts.items()] + [
        Room("w", "worker", {}, 8)
    ]


def test_the_two_of_a_shard_are_placed_apart() -> None:
    spec = spec_of(1, 2, replication=2)
    for there in (rooms(a="x", b="y"), rooms(a="x", b="x", c="y"), rooms(a="x", b="y", c="z")):
        places = place_gang(spec, there, 1, 1)
        assert not isinstance(places, str)
        hosts = {r.node: r.host for r in there}
        for shard in range(2):
            first, second = (hosts[places["server", i].node] for i in (shard, 2 + shard))
            assert first != second
    places = place_gang(spec, rooms(a="x"), 1, 1)
    assert not isinstance(places, str), "better on one host than not at all"
    again = place(spec, [("server", 0)], rooms(a="x", b="y"), {("server", 2): "b", ("server", 1): "a"})
    assert not isinstance(again, str)
    assert again["server", 0].node == "a"


def test_what_an_agent_is_told_to_start() -> None:
    model = Model(restarts=1).start()
    record = JobRecord(JOB, "", "", "", 0, model.life, None, 0.0)

    def told(index: int) -> tuple[bool, int, list[str]]:
        document = start_document(record, model.life.processes["server", index], "")
        return document["follows"], document["term"], document["fetch"]

    assert (told(0), told(2)) == ((False, 1, []), (True, 1, []))
    model.dies(0)
    model.settle()
    assert (told(0)[0], told(2)[:2]) == (True, (False, 2))


def test_names() -> None:
    assert [process_name("server", index, 2) for index in range(4)] == [
        "server/0",
        "server/1",
        "server/0b",
        "server/1b",
    ]
    assert (process_name("worker", 5, 2), process_name("server", 5)) == ("worker/5", "server/5")
    assert [server_index(text, 2) for text in ("0", "1b", "3")] == [0, 3, 3]
    with pytest.raises(ValueError, match="no number"):
        server_index("b", 2)


@pytest.mark.parametrize("replica", [3, {"backup": 3}, {"backup": [1]}, {"backup": ["a", "b"]}, {"term": "x"}])
def test_what_a_replica_says_of_itself_is_checked(replica: Any) -> None:
    with pytest.raises(ProtocolError):
        check_report({"replica": replica})
