"""Copies of a job's committed checkpoints at a URL, made beside the training in a thread of their own.

Only the newest is wanted: where copying takes longer than an interval, those between are left out. What fails is tried
again until it succeeds or the job has ended, and is said in ``state.problem`` meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from downpour_common.errors import CheckpointError
from downpour_coordinator.checkpointing import Copying
from downpour_coordinator.manifest import Manifest
from downpour_coordinator.sources import MANIFEST, FolderSource, manifest_of
from downpour_coordinator.urls import UrlStore

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
TRIES_AT_THE_END = 3
QUIET_S = 60.0
"""Time without a byte after which nobody waits any longer for the last copy."""


class Copies:
    """Of the run directory ``run`` at ``url``, the ``keep`` newest. ``job`` tells its checkpoints from others' there.

    ``first_retry_s``: time before the first further attempt; it doubles with each.
    """

    def __init__(
        self,
        run: str,
        url: str,
        keep: int,
        job: str,
        first_retry_s: float = FIRST_RETRY_S,
        open_store: Callable[[str], UrlStore] = UrlStore,
    ) -> None:
        self.state = Copying(url)
        self._source = FolderSource(run)
        self._keep, self._job = keep, job
        self._first_retry_s = first_retry_s
        self._open_store = open_store
        self._store: UrlStore | None = None
        self._ours: dict[int, str] = {}
        """numbers that have been here → the job that their manifest names"""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wanted = self._settled = 0
        self._closing = self._abandoned = False
        self._moved_s = time.monotonic()

    def offer(self, number: int) -> None:
        """Checkpoint ``number`` has been committed here."""
        with self._changed:
            self._wanted = max(self._wanted, number)
            self._moved_s = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-copies", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will be offered; the thread ends once the last copy is made, or has failed a few times."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody waits for the last copy any longer."""
        with self._changed:
            self._closing = self._abandoned = True
            self._changed.notify_all()

    def join(self, quiet_s: float = QUIET_S) -> str:
        """After :meth:`end`: wait for the last copy while bytes move. Why there is none, or ""."""
        thread = self._thread
        while thread is not None and thread.is_alive() and not self._abandoned:
            thread.join(0.05)
            if time.monotonic() - self._moved_s > quiet_s:
                return self.state.problem or f"{self.state.url} did not take a byte for {quiet_s:g} s"
        if self._abandoned and self._settled < self._wanted:
            return self.state.problem or f"checkpoint {self._wanted} was not waited for"
        return self.state.problem

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        failed = 0
        while (number := self._next()) is not None:
            try:
                self._copy(number)
            except Exception as error:  # whatever a file system raises: training must go on
                if not os.path.exists(self._source.where(number, MANIFEST)):
                    self._settled = max(self._settled, number)  # pruned here meanwhile; a newer one comes
                    continue
                failed += 1
                self.state.problem = f"checkpoint {number} is not at {self.state.url}: {error}"
                if self._abandoned or (self._closing and failed >= TRIES_AT_THE_END):
                    return
                with self._changed:
                    self._changed.wait(min(LONGEST_RETRY_S, self._first_retry_s * 2.0 ** min(failed - 1, 10)))
                self._moved_s = time.monotonic()
            else:
                failed = 0
                self._settled = max(self._settled, number)
                self.state.number, self.state.problem = number, ""

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._wanted > self._settled or self._closing)
            return self._wanted if self._wanted > self._settled and not self._abandoned else None

    def _copy(self, number: int) -> None:
        if self._store is None:
            self._store = self._open_store(self.state.url)
            if self._store.only is not None:
                self._store = None
                raise CheckpointError(self.state.url, "is a checkpoint itself; give another URL")
        store, source = self._store, self._source
        here = manifest_of(source, number)
        self._ours[number] = str(here.fields.get("job"))
        for each in source.numbers():
            if each not in self._ours:
                with suppress(CheckpointError):  # a damaged one
                    found = manifest_of(source, each)
                    self._ours[each] = str(found.fields.get("job"))
        there = self._manifest_there(number)
        if there is None or there.fields != here.fields:
            if there is not None and there.fields.get("job") not in (*self._ours.values(), self._job):
                raise CheckpointError(
                    store.where(number, ""), f"is of job {there.fields.get('job')}; give each job a URL of its own"
                )
            if there is not None:
                store.remove(number)
            store.put(source, number, self._moved)
        self._prune(number)

    def _manifest_there(self, number: int) -> Manifest | None:
        assert self._store is not None
        try:
            return self._store.manifest(number)
        except CheckpointError:
            return None  # torn: it never counted

    def _prune(self, newest: int) -> None:
        """Delete older ones that this job, or the one that it goes on from, has put there."""
        store = self._store
        assert store is not None
        jobs = {*self._ours.values(), self._job}
        older = [n for n in store.all_numbers() if n < newest]
        sound = 1
        for number in reversed(older):
            manifest = self._manifest_there(number)
            if manifest is not None and manifest.fields.get("job") not in jobs:
                continue
            sound += manifest is not None
            if manifest is None and number not in self._ours:
                continue
            if manifest is None or sound > self._keep:
                store.remove(number)

    def _moved(self) -> None:
        self._moved_s = time.monotonic()
        if self._abandoned:
            raise CheckpointError(self.state.url, "the last copy was given up")
