"""A job's workers and shards, as far as they have shown themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from downpour_common import messages as m
from downpour_common.messages import Message
from downpour_common.transport import Peer
from downpour_coordinator.losses import Past

_ANSWERS: dict[str, type[Message]] = {
    cls.__name__: cls for cls in (m.Ack, m.Lease, m.Minimised, m.PassBegins, m.Portion, m.Refused, m.Welcome)
}
_FIELDS = {name: [f.name for f in fields(cls)] for name, cls in _ANSWERS.items()}


def _values(message: Message) -> list[Any]:
    """The fields' values in their order; there are thousands of answers, and ``asdict`` takes its time."""
    return [getattr(message, name) for name in _FIELDS[type(message).__name__]]


@dataclass(slots=True)
class Worker:
    """One slot. ``answered``: it has been welcomed. ``gone``: it will do no more, well (``left``) or not."""

    slot: int
    peer: Peer = b""
    request: int = 0
    epoch: int = 0
    pid: int = 0
    answered: bool = False
    gone: bool = False
    drained: bool = False
    finished: bool = False
    """it has come to its script's end: its parts of passes stay its own"""
    leaving: bool = False
    """it has announced that it leaves: it gets no part of passes that are split from now on"""
    takes_over: bool = False
    """sync: it goes on where another process in its slot has died; the slot has stayed a member"""
    start: tuple[int, ...] = ()
    """clock, pass and offset that it, or the process it has taken over from, was welcomed with"""
    begun: int = -1
    """newest pass over the first loader that it has begun"""
    former: int = -1
    """… and that those have begun which it has taken over from"""
    progress: m.Progress | None = None
    answers: dict[int, Message | None] = field(default_factory=dict)
    """by request number: what was answered, None while it waits"""

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {
            "slot": self.slot,
            "epoch": self.epoch,
            "pid": self.pid,
            "answered": self.answered,
            "gone": self.gone,
            "drained": self.drained,
            "finished": self.finished,
            "leaving": self.leaving,
            "takes_over": self.takes_over,
            "start": self.start,
            "begun": self.begun,
            "former": self.former,
            "progress": asdict(self.progress) if self.progress else None,
            "answers": [[r, type(a).__name__, _values(a)] if a else [r, "", []] for r, a in self.answers.items()],
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Worker:
        """The inverse of :meth:`document`."""
        answers: dict[int, Message | None] = {}
        for request, name, values in document["answers"]:
            plain = [tuple(v) if isinstance(v, list) else v for v in values]
            answers[request] = _ANSWERS[name](*plain) if name else None
        progress = progress_from(document["progress"]) if document["progress"] else None
        return cls(
            document["slot"],
            epoch=document["epoch"],
            pid=document["pid"] if document["answered"] or document["gone"] else 0,  # who waits will ask again
            answered=document["answered"],
            gone=document["gone"],
            drained=document["drained"],
            finished=document["finished"],
            leaving=document["leaving"],
            takes_over=document["takes_over"],
            start=tuple(document["start"]),
            begun=document["begun"],
            former=document["former"],
            progress=progress,
            answers=answers,
        )


def progress_from(document: dict[str, Any]) -> m.Progress:
    """What ``asdict`` and the journal made of it, again."""
    return m.Progress(**{**document, "shard_epochs": tuple(document.get("shard_epochs", ()))})


@dataclass(slots=True)
class ShardEntry:
    """One shard, and its process of now, which leads. ``members``: the version of the members that it has in force."""

    index: int
    epoch: int = 0
    """of the process"""
    peer: Peer = b""
    address: str = ""
    pid: int = 0
    ready: bool = False
    members: int = 0
    recovers: bool = False
    """it takes the place of one that has died while the job went on"""
    checkpoint: int = 0
    """… from its file in this checkpoint; 0 while that is being looked for"""
    since: int = 0
    """it has moved, and serves once it has the members of this version"""
    error: str = ""
    """why it could not come back"""
    past: Past = field(default_factory=Past)
    report: dict[str, Any] = field(default_factory=dict)
    reports: int = 0
    """how many have come since the training began, or this process was started"""
    process: int = -1
    """index of its process among the job's; -1: ``index``"""
    term: int = -1
    """its epoch to the workers; -1: its process' epoch"""
    moved: bool = False
    """workers that were there before have to be told where it is now"""
    promoting: bool = False
    """its process has followed, and has not said yet that it leads"""
    replica: dict[str, Any] = field(default_factory=dict)
    """what its process says of leading and following"""

    def __post_init__(self) -> None:
        self.process = self.index if self.process < 0 else self.process
        self.term = self.epoch if self.term < 0 else self.term

    @property
    def serves(self) -> bool:
        """Whether workers may speak to it."""
        return self.ready and not self.promoting and self.members >= self.since

    @property
    def away(self) -> bool:
        """Whether workers wait for it to be there again."""
        return self.moved and not self.serves

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        names = (
            *("index", "epoch", "address", "pid", "ready", "members", "recovers", "checkpoint", "since", "error"),
            *("process", "term", "moved", "promoting"),
        )
        return {**{n: getattr(self, n) for n in names}, "past": self.past.document(), "report": self.report}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> ShardEntry:
        """The inverse of :meth:`document`."""
        return cls(**{**document, "past": Past.from_document(document["past"])})
