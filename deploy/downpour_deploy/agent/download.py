"""Getting one file of a job from the coordinator, part by part. I/O-free.

Up to :data:`WINDOW` parts are under way or being written at a time; one that does not come is asked for again, with the
same number, until the whole file has made no progress for ``stall_s`` seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages import FileData, GetFile, Refusal, Refused
from downpour_deploy.agent.effects import Numbers

PART_BYTES = 1 << 20
WINDOW = 4
REPEAT_S = 2.0


@dataclass(slots=True)
class _Asked:
    message: GetFile
    sent_s: float
    arrived: bool = False


class Download:
    """One file on its way. ``error`` says why it will not come, else it is empty."""

    def __init__(self, job: str, path: str, numbers: Numbers, stall_s: float, now_s: float) -> None:
        self.job, self.path = job, path
        self.size: int | None = None
        self.error = ""
        self._numbers = numbers
        self._stall_s = stall_s
        self._progress_s = now_s
        self._next = 0
        self._asked: dict[int, _Asked] = {}

    @property
    def complete(self) -> bool:
        """Whether every part has been written."""
        return self.size is not None and self._next >= self.size and not self._asked

    def outgoing(self, now_s: float) -> list[GetFile]:
        """Requests to send now; notices when it has come to a standstill."""
        if self.error or self.complete:
            return []
        if now_s - self._progress_s >= self._stall_s:
            self.error = f"the coordinator sent nothing of {self.path} for {self._stall_s:g} s"
            return []
        late = [a for a in self._asked.values() if not a.arrived and now_s - a.sent_s >= REPEAT_S]
        for asked in late:
            asked.sent_s = now_s
        requests = [asked.message for asked in late]
        # The first part tells the size; until then nothing else is asked for.
        end = PART_BYTES if self.size is None else self.size
        while len(self._asked) < WINDOW and (self._next < end):
            length = PART_BYTES if self.size is None else min(PART_BYTES, self.size - self._next)
            message = GetFile(self._numbers.new(), self.job, self.path, self._next, length)
            self._asked[message.request] = _Asked(message, now_s)
            self._next += length
            requests.append(message)
        return requests

    def received(self, answer: FileData | Refused, now_s: float) -> FileData | None:
        """A part to be written, then told to :meth:`written`; None for what is no part of this file, or comes twice."""
        asked = self._asked.get(answer.request)
        if asked is None or asked.arrived or self.error:
            return None
        if isinstance(answer, Refused):
            if answer.code != Refusal.NOT_READY:
                self.error = f"the coordinator does not give {self.path}: {answer.reason}"
            return None
        message = asked.message
        size = answer.size if self.size is None else self.size
        due = max(0, min(message.length, size - message.offset))
        if (answer.size, answer.offset, memoryview(answer.payload).nbytes) != (size, message.offset, due):
            self.error = f"{self.path} changed while it was fetched, or the coordinator sent something else"
            return None
        self.size = size
        self._next = min(self._next, size)
        asked.arrived = True
        self._progress_s = now_s
        return answer

    def written(self, part: FileData, now_s: float) -> None:
        """The part is in the file."""
        del self._asked[part.request]
        self._progress_s = now_s
