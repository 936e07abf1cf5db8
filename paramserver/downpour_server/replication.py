"""What a shard's process has to do with its other replica: a thin loop around :mod:`downpour_server.replica`.

A follower connects to its leader's data socket, as workers do, and waits for what comes back through that; a leader
hears of its follower among its workers' messages. So each waits at one place only.
"""

from __future__ import annotations

from collections.abc import Callable

from downpour_common import failpoints
from downpour_common import messages as m
from downpour_common.messages import Message
from downpour_common.transport import ClientTransport, Peer
from downpour_server.config import ShardConfig
from downpour_server.effects import Effect, Tell
from downpour_server.replica import Follower, Leader
from downpour_server.shard import Shard

SAY_S = 0.5
"""Time between two words of a follower."""


class Replication:
    """One replica of a shard, from its set-up on. ``make`` gives an empty shard that serves in a term; ``connect`` a
    transport to a leader. ``news`` is told when the coordinator should hear something at once."""

    def __init__(
        self,
        config: ShardConfig,
        make: Callable[[int], Shard],
        connect: Callable[[], ClientTransport],
        news: Callable[[], None],
    ) -> None:
        self._config = config
        self._connect = connect
        self._news = news
        self._link: ClientTransport | None = None
        self._address = ""
        self._said_s = float("-inf")
        self._was = (not config.follows, False)
        self.follower: Follower | None = None
        self.leader: Leader | None = None
        if config.follows:
            self.follower = Follower(make, config.index, config.shard_epoch)
        else:
            self.leader = Leader(make(config.first_term), config.first_term)

    @property
    def shard(self) -> Shard:
        """The one that is led, or fed."""
        replica = self.leader or self.follower
        assert replica is not None
        return replica.shard

    @property
    def follows(self) -> bool:
        """Whether it has a leader to listen to."""
        return self.leader is None and bool(self._address)

    @property
    def members_version(self) -> int:
        """Of the members in force, wherever this shard goes on."""
        return self.shard.members_version if self.leader is None else self.leader.members_version

    def close(self) -> None:
        """Close the connection to a leader."""
        if self._link is not None:
            self._link.close()

    def document(self) -> dict[str, object]:
        """For the coordinator."""
        replica = self.leader or self.follower
        assert replica is not None
        return replica.document()

    def told(self, message: Message) -> list[Effect]:
        """What the coordinator says of leaders and followers."""
        match message:
            case m.SetBackup() if self.leader is not None:
                return self.leader.set_backup(message)
            case m.Follow() if self.leader is None and self.follower is not None:
                if self.follower.follow(message.term):
                    self._address = message.address
                    self._said_s = float("-inf")
            case m.Promote():
                config, error = self._config, self._promote(message.term)
                return [Tell(m.Promoted(config.job, config.index, config.shard_epoch, message.term, error))]
            case _:
                pass
        return []

    def _promote(self, term: int) -> str:
        if self.leader is not None:
            return "" if self.leader.term == term else f"it leads in term {self.leader.term}"
        assert self.follower is not None
        error = self.follower.promote(term)
        if not error:
            self.leader = Leader(self.follower.shard, term)
        return error

    # ------------------------------------------------------------ as a leader

    def before(self, message: Message) -> list[Effect]:
        """An input is about to be taken: these effects come first."""
        assert self.leader is not None
        return [] if self.leader.alone else self.leader.pass_on(message)

    def after(self, effects: list[Effect]) -> list[Effect]:
        """Of the effects of what was taken, those that may leave now."""
        assert self.leader is not None
        return effects if self.leader.alone else self.leader.hold(effects)

    def heard(self, peer: Peer, message: m.Replicated | m.Fenced) -> list[Effect]:
        """What followers say to a leader."""
        assert self.leader is not None
        if isinstance(message, m.Fenced):
            self.leader.fence(message)
            return []
        return self.leader.replicated(peer, message)

    # ------------------------------------------------------------ as a follower

    def take(self, timeout_s: float) -> bool:
        """Take what the leader says; whether there was anything to do."""
        assert self.follower is not None
        link, behind = self._connection(), self.follower.behind
        items = [message for _, message in link.poll(0 if behind else timeout_s)]
        for answer in self.follower.receive(items):
            if failpoints.on:
                failpoints.hit("shard.acknowledge.before")
            link.send(self._address, answer)
        self.follower.apply()
        return bool(items or behind)

    def turn(self, now_s: float) -> None:
        """Say to the leader what it may have missed; turn away leaders of before; tell news."""
        if self.follower is not None and self._address:
            if self.leader is not None:
                link = self._connection()
                for answer in self.follower.receive(message for _, message in link.poll(0)):
                    link.send(self._address, answer)
            elif now_s - self._said_s >= SAY_S:
                self._said_s = now_s
                self._connection().send(self._address, self.follower.say())
        now = (self.leader is not None, bool(self.document()["complete"]))
        if now != self._was:
            self._was = now
            self._news()

    def _connection(self) -> ClientTransport:
        if self._link is None:
            self._link = self._connect()
        return self._link
