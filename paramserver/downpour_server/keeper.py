"""What becomes of a shard's snapshots: written beside the training, sent to the coordinator's host where the job asks
for it, and answered, once per number, however often it is asked for."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from downpour_common import failpoints
from downpour_common import messages as m
from downpour_common.errors import DownpourError
from downpour_common.messages import Message
from downpour_server.config import ShardConfig
from downpour_server.snapshot import WriteSnapshot, write
from downpour_server.upload import Upload

ANSWERS_KEPT = 8


@dataclass(slots=True)
class _Sending:
    """A file under way."""

    snapshot: int
    path: str
    document: dict[str, Any]
    upload: Upload
    descriptor: int


class SnapshotKeeper:
    """Writes, uploads and answers. Never blocks for longer than reading a few MiB from the page cache takes.

    A number is one attempt: asked for again, it is answered again as it was. A newer one ends an older that is not
    answered yet, except that without uploads a file that is being written is finished.
    """

    def __init__(self, config: ShardConfig, tell: Callable[[Message], None]) -> None:
        self.answered = 0
        """newest number that has an answer"""
        self._config = config
        self._tell = tell
        self._writer = ThreadPoolExecutor(1, "snapshot")
        self._writing: list[tuple[WriteSnapshot, Future[dict[str, Any]]]] = []
        self._sending: _Sending | None = None
        self._answers: dict[int, m.SnapshotTaken] = {}
        self._newest = 0
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Waits for the file that is being written."""
        self._writer.shutdown()
        if self._sending is not None:
            os.close(self._sending.descriptor)
            self._sending = None

    def asked(self, request: m.TakeSnapshot) -> bool:
        """Whether the shard is to begin this snapshot; if it has been answered before, it is answered again."""
        if (answer := self._answers.get(request.snapshot)) is not None:
            self._tell(answer)
        if request.snapshot <= self._newest:
            return False
        self._newest = request.snapshot
        self._give_up()
        return True

    def write(self, effect: WriteSnapshot) -> None:
        """Write the file in the background, or answer why there is none."""
        if effect.error:
            self._answer(effect.snapshot, effect.error, {})
        else:
            placed = replace(effect, folder=self._config.path(effect.folder))
            self._writing.append((placed, self._writer.submit(_write, placed)))

    def turn(self, now_s: float) -> None:
        """See to files that have been written, and send what is due."""
        for effect, future in [pair for pair in self._writing if pair[1].done()]:
            self._writing.remove((effect, future))
            try:
                self._written(effect, future.result())
            except (DownpourError, OSError) as problem:
                self._answer(effect.snapshot, str(problem), {})
        if self._sending is not None:
            self._send(self._sending, now_s)

    def received(self, answer: m.Ack | m.Refused, now_s: float) -> None:
        """The coordinator's answer to a part."""
        if self._sending is None:
            return
        if isinstance(answer, m.Ack):
            self._sending.upload.acknowledged(answer.request, answer.version, now_s)
        else:
            self._sending.upload.refused(answer.request, answer.reason)

    def _written(self, effect: WriteSnapshot, document: dict[str, Any]) -> None:
        if not self._config.upload:
            self._answer(effect.snapshot, "", document)
            return
        path = os.path.join(effect.folder, document["file"])
        if effect.snapshot < self._newest:
            _remove(path)
            self._answer(effect.snapshot, "a newer snapshot was asked for", {})
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        upload = Upload(document["bytes"], self._numbers)
        self._sending = _Sending(effect.snapshot, path, document, upload, descriptor)

    def _send(self, sending: _Sending, now_s: float) -> None:
        config, upload = self._config, sending.upload
        try:
            for part in upload.outgoing(now_s):
                data = os.pread(sending.descriptor, part.length, part.offset)
                self._tell(
                    m.SnapshotPart(
                        part.request,
                        config.job,
                        config.index,
                        config.shard_epoch,
                        sending.snapshot,
                        sending.document["file"],
                        part.offset,
                        data,
                    )
                )
        except OSError as problem:
            upload.error = str(problem)
        if upload.done:
            self._end_sending("")
        elif upload.error:
            self._end_sending(f"the file could not be sent to the coordinator: {upload.error}")

    def _give_up(self) -> None:
        if self._sending is not None:
            self._end_sending("a newer snapshot was asked for")

    def _end_sending(self, error: str) -> None:
        assert self._sending is not None
        sending, self._sending = self._sending, None
        os.close(sending.descriptor)
        _remove(sending.path)
        self._answer(sending.snapshot, error, {} if error else sending.document)

    def _answer(self, snapshot: int, error: str, document: dict[str, Any]) -> None:
        config = self._config
        taken = m.SnapshotTaken(config.job, config.index, config.shard_epoch, snapshot, error, document)
        self._answers[snapshot] = taken
        while len(self._answers) > ANSWERS_KEPT:
            del self._answers[min(self._answers)]
        self.answered = max(self.answered, snapshot)
        self._tell(taken)


def _write(effect: WriteSnapshot) -> dict[str, Any]:
    try:
        if failpoints.on:
            failpoints.hit("shard.snapshot.before")
        began_s = time.thread_time()
        document = write(effect)
        cores = len(os.sched_getaffinity(0))
        document["cost_s"] = round((time.thread_time() - began_s) / cores, 6)
        if failpoints.on:
            failpoints.hit("shard.snapshot.after")
        return document
    finally:
        effect.reading.done = True


def _remove(path: str) -> None:
    """The file, and its folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
