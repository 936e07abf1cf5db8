"""Brings to this host what a process needs: the job's code, unpacked once, and files of its checkpoints."""

from __future__ import annotations

import asyncio
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

from downpour_common.errors import DownpourError
from downpour_common.messages import Document, FileData, Message, Refused
from downpour_deploy.agent.download import Download
from downpour_deploy.agent.effects import Numbers, ProcessId
from downpour_deploy.agent.folder import DataFolder

FILES = 4
"""Files on their way at a time, each with a few parts in memory."""


class FetchError(DownpourError):
    """Something that a process needs cannot be had."""


class Fetcher:
    """What several processes of a job need is fetched once, and kept until the job is forgotten.

    ``send`` sends to the coordinator; ``received`` and ``tick`` are to be called as their names say. Files are written
    by other threads, parts in any order.
    """

    def __init__(
        self,
        folder: DataFolder,
        numbers: Numbers,
        send: Callable[[Message], None],
        clock: Callable[[], float],
        stall_s: float,
    ) -> None:
        self._folder, self._numbers, self._send, self._clock, self._stall_s = folder, numbers, send, clock, stall_s
        self._downloads: dict[Download, asyncio.Queue[FileData | None]] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(FILES)
        self._bundles: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def prepare(self, process: ProcessId, document: Document) -> None:
        """Have everything here that ``process`` needs. Raises :class:`DownpourError`, :class:`OSError`."""
        job, wanted = process.job, [str(path) for path in document.get("fetch") or []]
        needs = [self._once(job, f"file {path}", functools.partial(self._file, job, path)) for path in wanted]
        if process.role == "worker" or _runs_code(document):
            needs.append(self._once(job, "code", functools.partial(self._code, job, str(document.get("bundle")))))
        await asyncio.gather(*needs)

    def received(self, message: Message) -> None:
        """A message of the coordinator, which may be a part of a file."""
        if not isinstance(message, FileData | Refused):
            return
        now_s = self._clock()
        for download, parts in self._downloads.items():
            part = download.received(message, now_s)
            if part is not None or download.error:
                parts.put_nowait(part)

    def tick(self) -> None:
        """Ask for what has not been asked for, or has not come."""
        for download, parts in self._downloads.items():
            self._ask(download)
            if download.error:
                parts.put_nowait(None)

    async def forget(self, job: str) -> None:
        """Give up what is on its way for the job, then remove its folder."""
        tasks = [self._tasks.pop(key) for key in list(self._tasks) if key[0] == job]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._folder.remove_job, job)

    async def close(self) -> None:
        """Give up everything."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ one thing

    async def _once(self, job: str, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have ``work`` done if nobody has yet; a failure is every waiting process', and the next one tries again."""
        task = self._tasks.get((job, what))
        if task is None or (task.done() and _failed(task)):
            task = self._tasks[job, what] = asyncio.create_task(work())
            task.add_done_callback(_failed)  # which also counts as having looked at the failure
        await asyncio.shield(task)

    async def _code(self, job: str, digest: str) -> None:
        async with self._bundles[digest]:
            if not await asyncio.to_thread(self._folder.has_bundle, digest):
                await self._download(job, "bundle", self._folder.bundle(digest))
        await _to_the_end(self._folder.unpack, job, digest)

    async def _file(self, job: str, path: str) -> None:
        async with self._room:
            await self._download(job, path, self._folder.target(job, path))

    async def _download(self, job: str, path: str, target: str) -> None:
        """The file appears at ``target`` when it is complete."""
        download = Download(job, path, self._numbers, self._stall_s, self._clock())
        parts = self._downloads[download] = asyncio.Queue()
        unfinished = f"{target}.part"
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
                self._ask(download)
                while not download.complete:
                    part = await parts.get()
                    if part is None:
                        raise FetchError(download.error)
                    await _to_the_end(_write, file.fileno(), part)
                    download.written(part, self._clock())
                    self._ask(download)
            os.replace(unfinished, target)
        finally:
            del self._downloads[download]
            if os.path.exists(unfinished):
                os.unlink(unfinished)

    def _ask(self, download: Download) -> None:
        for message in download.outgoing(self._clock()):
            self._send(message)


def _runs_code(document: Document) -> bool:
    """Whether the job brings an update rule of its own, which its shards import."""
    spec = document.get("spec")
    return isinstance(spec, dict) and bool(spec.get("rule"))


def _failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None


async def _to_the_end(function: Callable[..., None], *arguments: object) -> None:
    """Run it in a thread; when cancelled, only once the thread has let go of what it works on."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _write(file: int, part: FileData) -> None:
    data, at = memoryview(part.payload), part.offset
    while data:
        done = os.pwrite(file, data, at)
        data, at = data[done:], at + done
