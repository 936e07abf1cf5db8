"""``downpour run``: where a job on this machine begins and ends."""

from __future__ import annotations

import os
import shutil
import tempfile

import uvloop

from downpour_common import failpoints
from downpour_common.config import JobSpec
from downpour_common.transport.zeromq import ZmqServer
from downpour_common.wire import CONTROL_HEADER_LIMIT
from downpour_coordinator.outcome import Outcome
from downpour_coordinator.summary import SUMMARY, forget_summary, write_summary
from downpour_deploy import launch
from downpour_deploy.display import Display
from downpour_deploy.local_job import LocalJob
from downpour_deploy.resolve import ResolvedJob


def run_job(job: ResolvedJob, json_output: bool, quiet: bool) -> int:
    """Run ``job`` to its end; an exit code. Raises :class:`ConfigError` when it cannot start."""
    failpoints.arm("coordinator")
    display = Display(json_output, quiet)
    outcome = uvloop.run(_run(job, display))
    display.finish(outcome)
    return outcome.exit_code


async def _run(job: ResolvedJob, display: Display) -> Outcome:
    runtime = tempfile.mkdtemp(prefix="downpour-", dir=_socket_base(job.spec))
    try:
        transport = ZmqServer(
            launch.endpoint(job.spec, runtime, "coordinator", job.spec.settings.port), CONTROL_HEADER_LIMIT
        )
        try:
            os.makedirs(os.path.join(job.spec.out, "logs"), exist_ok=True)
            forget_summary(job.spec.out)
            metrics = open(os.path.join(job.spec.out, "metrics.jsonl"), "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            display.start(job)
            outcome = await LocalJob(job, display, runtime, transport, metrics).run()
            try:
                metrics.close()
            except OSError as error:
                outcome.warnings.append(f"metrics were lost: {error.strerror or error}")
            try:
                write_summary(job.spec.out, outcome.document())
            except OSError as error:
                outcome.warnings.append(f"{SUMMARY} was not written: {error.strerror or error}")
            return outcome
        finally:
            transport.close()
    finally:
        display.stop()
        shutil.rmtree(runtime, ignore_errors=True)


def _socket_base(spec: JobSpec) -> str | None:
    """A folder with a path short enough for sockets (the kernel allows 107 bytes)."""
    if spec.settings.transport == "ipc" and len(tempfile.gettempdir()) > 60:
        return "/tmp"
    return None
