"""A job's workers and shards, as far as they have shown themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from downpour_common import messages as m
from downpour_common.messages import Message
from downpour_common.transport import Peer

_ANSWERS: dict[str, type[Message]] = {cls.__name__: cls for cls in (m.Ack, m.Lease, m.PassBegins, m.Refused, m.Welcome)}
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
        progress = m.Progress(**document["progress"]) if document["progress"] else None
        return cls(
            document["slot"],
            epoch=document["epoch"],
            pid=document["pid"] if document["answered"] or document["gone"] else 0,  # who waits will ask again
            answered=document["answered"],
            gone=document["gone"],
            drained=document["drained"],
            finished=document["finished"],
            leaving=document["leaving"],
            progress=progress,
            answers=answers,
        )


@dataclass(slots=True)
class ShardEntry:
    """One shard process. ``members``: the version of the members that it has in force."""

    index: int
    peer: Peer = b""
    address: str = ""
    pid: int = 0
    ready: bool = False
    members: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    reports: int = 0
    """how many have come since the training began, or this process was started"""

    def document(self) -> list[Any]:
        """Plain values, for the journal."""
        return [self.index, self.address, self.pid, self.ready, self.members, self.report]

    @classmethod
    def from_document(cls, document: list[Any]) -> ShardEntry:
        """The inverse of :meth:`document`."""
        index, address, pid, ready, members, report = document
        return cls(index, b"", address, pid, ready, members, report)
