"""The coordinator's process: a thin loop around :class:`Cluster`, its journal and its files.

Order of things: messages are handled, their metrics and files written, the journal committed, and only then do answers
leave. So whatever anybody was told survives ``kill -9``; what nobody was told is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, TextIO

from downpour_common import failpoints
from downpour_common import messages as m
from downpour_common.config import job_spec, to_toml
from downpour_common.errors import CheckpointError, ConfigError, DownpourError
from downpour_common.keys import KeyPair, ServerKeys
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.transport import Peer
from downpour_common.transport.zeromq import ZmqServer
from downpour_coordinator import checkpoints
from downpour_coordinator.access import allowed
from downpour_coordinator.cluster import Cluster, Effect, ForJob, JobKeys, JobRecord, record_document, record_from
from downpour_coordinator.describe import job_document, node_document
from downpour_coordinator.effects import Send, StorePart
from downpour_coordinator.facts import facts_for
from downpour_coordinator.files import DIGEST, Files
from downpour_coordinator.journal import Journal
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.nodes import Node
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.service import JobService
from downpour_coordinator.summary import write_summary

PUMP_S = 0.02
"""Longest wait before the socket is looked at, should its descriptor have stayed silent."""
TICK_S = 0.1
_TOKEN = re.compile(r"[0-9a-f]{32}")


class CoordinatorDaemon:
    """Serves until :meth:`stop`. ``new_key_pair`` is None where security is off; ``audit`` gets a line per act;
    ``copies_to``: URLs at and below which jobs may have their checkpoints copied, as the coordinator's user."""

    def __init__(
        self,
        transport: ZmqServer,
        files: Files,
        journal: Journal,
        keys: ServerKeys | None,
        new_key_pair: Callable[[], KeyPair] | None,
        node_timeout_s: float,
        audit: Callable[[str], None],
        copies_to: tuple[str, ...] = (),
    ) -> None:
        self._transport = transport
        self._files = files
        self._journal = journal
        self._keys = keys
        self._new_key_pair = new_key_pair
        self._audit = audit
        self._copies_to = copies_to
        self._stop = asyncio.Event()
        self._trouble = False
        """whether the journal could not be written the last time"""
        self._outbox: list[tuple[Peer, Message]] = []
        self._services: dict[str, JobService] = {}
        self._metrics: dict[str, TextIO] = {}
        self._models: set[str] = set()
        self._blamed: set[str] = set()
        """who has sent nonsense, which is told once"""
        self._working: set[asyncio.Future[Any]] = set()
        self._offset_s = time.time() - time.monotonic()
        self._started_s = self._now()
        self._version = version("downpour-ps")
        self.cluster = Cluster(node_timeout_s, keys.pair.public if keys else "", self._version)
        self._restore()

    def _now(self) -> float:
        """Unix seconds, which never go back while this process lives."""
        return time.monotonic() + self._offset_s

    def stop(self) -> None:
        """End :meth:`run` soon. Jobs go on without the coordinator until it is started again."""
        self._stop.set()

    async def run(self) -> None:
        """Serve."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._transport.fileno(), self._pump)
        ticked_s = 0.0
        try:
            while not self._stop.is_set():
                try:
                    await asyncio.wait_for(self._stop.wait(), PUMP_S)
                except TimeoutError:
                    pass
                self._pump()
                if (now_s := self._now()) - ticked_s >= TICK_S:
                    ticked_s = now_s
                    self._carry_out(self.cluster.tick(now_s))
                    self._flush()
        finally:
            loop.remove_reader(self._transport.fileno())
            if self._working:
                await asyncio.wait(self._working, timeout=30.0)
            for file in self._metrics.values():
                file.close()

    # ------------------------------------------------------------ messages

    def _pump(self) -> None:
        while arrived := self._transport.poll_users(0):
            for peer, user, message in arrived:
                try:
                    self._take(peer, user, message)
                except DownpourError as error:
                    self._transport.malformed += 1
                    if user not in self._blamed:
                        self._blamed.add(user)
                        who = user or "somebody"
                        self._audit(f"{who} sent a {type(message).__name__} that makes no sense: {error}")
            self._flush()

    def _take(self, peer: Peer, user: str, message: Message) -> None:
        cluster, now_s = self.cluster, self._now()
        if not allowed(user, message):
            self._refuse(peer, message, Refusal.FORBIDDEN, f"the key of {user!r} may not send {type(message).__name__}")
            return
        match message:
            case m.FromShard() | m.SnapshotPart() | m.WorkerRequest() | m.WorkerNotice():
                self._carry_out(cluster.of_process(peer, message, now_s))
            case m.Heartbeat():
                self._carry_out(cluster.heartbeat(peer, user, message, now_s))
            case m.LogData():
                if cluster.owns(user, message) and message.index >= 0 and message.epoch >= 0:
                    self._outbox.append((peer, self._files.put_log(message)))
                else:
                    known = cluster.knows(user, message.node, message.instance)
                    code = Refusal.UNKNOWN if known else Refusal.NOT_READY  # it will register first
                    self._refuse(peer, message, code, f"job {message.job} has nothing on {message.node}")
            case m.RegisterNode():
                self._carry_out(cluster.register_node(peer, user, message, now_s))
            case m.ProcessEnded():
                self._carry_out(cluster.process_ended(peer, user, message, now_s))
            case m.NodeLeaving():
                self._carry_out(cluster.node_leaving(peer, user, message, now_s))
            case m.Ping():
                self._outbox.append((peer, m.Pong(message.request, self._facts(), message.payload)))
            case m.PutBundle():
                self._outbox.append((peer, self._files.put_bundle(message)))
            case m.ListJobs():
                records = sorted(cluster.jobs.values(), key=lambda r: r.submitted_s, reverse=True)
                jobs = [job_document(cluster, r, now_s, full=False) for r in records]
                self._outbox.append((peer, m.Reply(message.request, {"jobs": jobs})))
            case m.ListNodes():
                nodes = [node_document(cluster, n, now_s) for n in cluster.nodes.values()]
                document = {"nodes": sorted(nodes, key=lambda n: str(n["node"])), "coordinator": self._facts()}
                self._outbox.append((peer, m.Reply(message.request, document)))
            case (
                m.SubmitJob()
                | m.DescribeJob()
                | m.CancelJob()
                | m.ScaleJob()
                | m.CheckpointNow()
                | m.SetJob()
                | m.DrainNode()
            ):
                self._user_request(peer, user, message, now_s)
            case m.ListFiles() | m.GetFile():
                self._file_request(peer, message)
            case _:
                self._refuse(peer, message, Refusal.MALFORMED, f"{type(message).__name__} is not for a coordinator")

    def _user_request(
        self,
        peer: Peer,
        user: str,
        message: m.SubmitJob | m.DescribeJob | m.CancelJob | m.ScaleJob | m.CheckpointNow | m.SetJob | m.DrainNode,
        now_s: float,
    ) -> None:
        cluster = self.cluster
        try:
            if isinstance(message, m.DrainNode):
                self._audit(f"{user or 'anybody'} {'undrains' if message.undo else 'drains'} node {message.node!r}")
                self._carry_out(cluster.drain(message.node, message.undo, now_s))
                document = node_document(cluster, cluster.nodes[message.node], now_s)
            elif isinstance(message, m.SubmitJob):
                document = self._submit(user, message, now_s)
            else:
                record = cluster.find(message.job)
                if isinstance(message, m.CancelJob):
                    self._audit(f"{user or 'anybody'} cancels {record.job}")
                    self._carry_out(cluster.cancel(record, now_s))
                elif isinstance(message, m.ScaleJob):
                    self._audit(f"{user or 'anybody'} scales {record.job} to {message.workers} workers")
                    self._carry_out(cluster.scale(record, message.workers, now_s))
                if isinstance(message, m.CheckpointNow):
                    document = record.life.checkpoint_now(message.token)
                elif isinstance(message, m.SetJob):
                    document = self._change(user, record, message)
                else:
                    document = self._describe(record)
            self._outbox.append((peer, m.Reply(message.request, document)))
        except LookupError:
            name = message.job if not isinstance(message, (m.SubmitJob, m.DrainNode)) else "to resume from"
            self._refuse(peer, message, Refusal.UNKNOWN, f"there is no job {name}")
        except _Refusal as refusal:
            self._refuse(peer, message, refusal.code, str(refusal))
        except ConfigError as error:
            code = Refusal.UNKNOWN if isinstance(message, m.DrainNode) else Refusal.UNUSABLE
            self._refuse(peer, message, code, str(error))

    def _change(self, user: str, record: JobRecord, message: m.SetJob) -> dict[str, Any]:
        """Raises :class:`ConfigError`."""
        news = not record.life.changes.knows(message.token)
        document = record.life.change(message.token, message.assignments)
        if news:
            self._audit(f"{user or 'anybody'} sets {', '.join(map(repr, message.assignments))} for {record.job}")
            self.cluster.dirty_jobs.add(record.job)
        return document

    def _describe(self, record: JobRecord) -> dict[str, Any]:
        document = job_document(self.cluster, record, self._now())
        document["checkpoints"] = checkpoints.committed(self._files.job(record.job))
        return document

    def _file_request(self, peer: Peer, message: m.ListFiles | m.GetFile) -> None:
        record = self.cluster.jobs.get(message.job)
        if record is None:
            self._refuse(peer, message, Refusal.UNKNOWN, f"there is no job {message.job}")
        elif isinstance(message, m.GetFile):
            self._outbox.append((peer, self._files.read(message, record.bundle)))
        else:
            self._outbox.append((peer, m.Reply(message.request, {"files": self._files.list(record.job)})))

    def _refuse(self, peer: Peer, message: Message, code: Refusal, reason: str) -> None:
        request = getattr(message, "request", None)
        if request is not None:
            self._outbox.append((peer, m.Refused(request, code.value, reason)))
        else:
            self._transport.malformed += 1

    def _facts(self) -> dict[str, Any]:
        security = "curve" if self._keys else "none"
        return {
            "version": self._version,
            "started_s": self._started_s,
            "time_s": time.time(),
            "security": security,
            "malformed": self._transport.malformed,
        }

    # ------------------------------------------------------------ new jobs

    def _submit(self, user: str, message: m.SubmitJob, now_s: float) -> dict[str, Any]:
        """Check and queue a job. Raises :class:`ConfigError`, :class:`_Refusal`, :class:`LookupError`."""
        cluster, document = self.cluster, message.document
        if not _TOKEN.fullmatch(message.token) or not DIGEST.fullmatch(message.bundle):
            raise _Refusal(Refusal.MALFORMED, "a submission has a token and the digest of its bundle")
        for record in cluster.jobs.values():
            if (record.token, record.user) == (message.token, user):
                return self._describe(record)
        fields = document.get("spec")
        if not isinstance(fields, dict):
            raise ConfigError("the submission has no spec")
        spec = job_spec(**fields).with_chunks(shared=False)  # settled once, for processes of any host at any time
        url = spec.settings.checkpoint_url
        if url and not any(url == prefix or url.startswith(f"{prefix.rstrip('/')}/") for prefix in self._copies_to):
            allowed_to = ", ".join(self._copies_to) or "nowhere; its administrator starts it with --copies-to URL"
            raise ConfigError(f"settings.checkpoint_url: {url}: this coordinator copies checkpoints to {allowed_to}")
        source, number, manifest = self._resume_from(spec.resume) if spec.resume else ("", 0, None)
        large = cluster.too_large(spec)
        if large and document.get("anyway") is not True:
            raise _Refusal(Refusal.TOO_LARGE, f"the cluster is too small for this job: {large}")
        if document.get("dry_run") is True:
            return self._dry_run(spec)
        if not self._files.has_bundle(message.bundle):
            raise _Refusal(Refusal.NOT_READY, "the job's code is not here; it must be sent first")
        job = f"{spec.name}-{secrets.token_hex(3)}"
        while job in cluster.jobs:
            job = f"{spec.name}-{secrets.token_hex(3)}"
        folder = self._files.job(job)
        try:
            os.makedirs(os.path.join(folder, "logs"))
            if manifest is not None:
                self._files.adopt_checkpoint(source, number, job)
            with open(os.path.join(folder, "job.toml"), "w", encoding="utf-8") as file:
                file.write(to_toml(spec))
        except OSError as error:
            raise _Refusal(Refusal.UNUSABLE, f"the coordinator cannot store the job: {error.strerror}") from None
        resume = f"checkpoints/{number:06d}" if manifest is not None else ""
        life = Lifecycle(job, spec, facts_for(job, spec, manifest, resume), "", number)
        keys = None
        if self._new_key_pair is not None:
            processes, shards = self._new_key_pair(), self._new_key_pair()
            keys = JobKeys((processes.public, processes.secret), (shards.public, shards.secret))
        size = os.path.getsize(os.path.join(self._files.bundles, message.bundle))
        record = JobRecord(job, user, message.token, message.bundle, size, life, keys, now_s)
        cluster.submit(record)
        self._serve(record)
        self._audit(f"{user or 'anybody'} submits {job}: {spec.script}, code {message.bundle[:12]}")
        self._carry_out(cluster.tick(now_s))
        return self._describe(record)

    def _dry_run(self, spec: Any) -> dict[str, Any]:
        places = self.cluster.would_place(spec)
        fits = not isinstance(places, str)
        return {
            "dry_run": True,
            "fits": fits,
            "message": "would start now" if fits else f"would wait: {places}",
            "placement": [{"role": r, "index": i, "node": p.node} for (r, i), p in places.items()] if fits else [],  # type: ignore[union-attr]
            "spec": spec.model_dump(mode="json"),
            "warnings": [],
        }

    def _resume_from(self, name: str) -> tuple[str, int, dict[str, Any]]:
        """(job, number, manifest) of the newest sound checkpoint of the job called ``name``."""
        if "://" in name:
            raise _Refusal(Refusal.CHECKPOINT, f"{name}: a submitted job goes on from a job of the cluster, not a URL")
        source = self.cluster.find(name).job
        try:
            found, _ = checkpoints.newest(self._files.job(source))
        except CheckpointError as error:
            raise _Refusal(Refusal.CHECKPOINT, f"job {source} has no usable checkpoint: {error}") from None
        return source, int(os.path.basename(found.folder)), found.manifest

    # ------------------------------------------------------------ effects

    def _serve(self, record: JobRecord, metrics_bytes: int | None = None) -> None:
        """Have what the job asks for carried out; its processes may connect from now on."""
        path = os.path.join(self._files.job(record.job), "metrics.jsonl")
        if metrics_bytes is not None and os.path.exists(path):
            os.truncate(path, min(metrics_bytes, os.path.getsize(path)))  # rows that nobody was told of come again
        metrics = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._metrics[record.job] = metrics
        folder = self._files.job(record.job)
        later = partial(self._later, record.job)
        self._services[record.job] = JobService(record.life, folder, self._send, metrics, self._now, later)
        if self._keys is not None and record.keys is not None:
            self._keys.allowed[record.keys.processes[0]] = f"job/{record.job}"

    def _release(self, record: JobRecord) -> None:
        """The job is over: its keys are worth nothing any more."""
        service = self._services.pop(record.job)
        if service.copies is not None:
            service.copies.end()
        self._metrics.pop(record.job).close()
        outcome = outcome_of(record.life, "", record.ended_s or self._now())
        with contextlib.suppress(OSError):  # a full disk; `downpour status` has the figures, too
            write_summary(self._files.job(record.job), {**outcome.document(), "job": record.job})
        if self._keys is not None and record.keys is not None:
            self._keys.allowed.pop(record.keys.processes[0], None)

    def _send(self, peer: Peer, message: Message) -> None:
        self._outbox.append((peer, message))

    def _later(self, job: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        future = asyncio.get_running_loop().run_in_executor(None, work)
        self._working.add(future)

        def finished(result: asyncio.Future[Any]) -> None:
            self._working.discard(future)
            done(result.result())
            self.cluster.settle(job, self._now())
            self._flush()

        future.add_done_callback(finished)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._outbox.append((effect.peer, effect.message))
                case ForJob():
                    if effect.job in self._services:
                        self._services[effect.job].carry_out(effect.effects)
                        if not all(isinstance(e, (Send, StorePart)) for e in effect.effects):
                            self.cluster.settle(effect.job, self._now())

    def _flush(self) -> None:
        """Commit what has changed, then let the answers go."""
        cluster = self.cluster
        if cluster.dirty_jobs or cluster.dirty_nodes:
            jobs = {job: self._job_row(cluster.jobs[job]) for job in cluster.dirty_jobs}
            models = {}
            for job in cluster.dirty_jobs:
                model = cluster.jobs[job].life.training.model
                if model is not None and job not in self._models:
                    models[job] = model.to_wire()
            nodes = {n: cluster.nodes[n].document() if n in cluster.nodes else None for n in cluster.dirty_nodes}
            try:
                failpoints.hit("coordinator.journal.before")
                self._journal.write(jobs, models, nodes)
                failpoints.hit("coordinator.journal.after")
            except (sqlite3.Error, OSError) as error:
                if not self._trouble:
                    self._audit(f"the journal cannot be written, so nothing is answered until it can: {error}")
                self._trouble = True
                return
            if self._trouble:
                self._trouble = False
                self._audit("the journal can be written again")
            self._models.update(models)
            for job in cluster.dirty_jobs:
                if cluster.jobs[job].over and job in self._services:
                    self._release(cluster.jobs[job])
            cluster.dirty_jobs.clear()
            cluster.dirty_nodes.clear()
        outbox, self._outbox = self._outbox, []
        for peer, message in outbox:
            if peer:
                self._transport.send(peer, message)

    def _job_row(self, record: JobRecord) -> dict[str, Any]:
        metrics = self._metrics.get(record.job)
        if metrics is not None:
            metrics.flush()
        path = os.path.join(self._files.job(record.job), "metrics.jsonl")
        return {**record_document(record), "metrics_bytes": os.path.getsize(path) if os.path.exists(path) else 0}

    def _restore(self) -> None:
        """Go on where the process before this one was."""
        now_s = self._now()
        for name, document in self._journal.nodes():
            self.cluster.nodes[name] = Node.from_document(document, now_s)
        for job, document, model in self._journal.jobs():
            spec = ModelSpec.from_wire(model) if model is not None else None
            record = record_from(job, document, spec, now_s)
            self.cluster.jobs[job] = record
            if model is not None:
                self._models.add(job)
            if not record.over:
                self._serve(record, document["metrics_bytes"])
        running = [r for r in self.cluster.jobs.values() if not r.over and r.life.phase is not Phase.QUEUED]
        if self.cluster.jobs:
            self._audit(f"goes on with {len(self.cluster.nodes)} nodes and {len(running)} running jobs")


class _Refusal(Exception):
    """A user's request that cannot be met, with its code."""

    def __init__(self, code: Refusal, reason: str) -> None:
        self.code = code
        super().__init__(reason)
