"""The commands on jobs other than submit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from downpour_common import exitcodes
from downpour_deploy.jobs.nodes import drain, nodes
from downpour_deploy.jobs.options import (
    TIMEOUT_S,
    AnswerTimeout,
    AsJson,
    JobName,
    Join,
    Keys,
    LogsName,
    Security,
    Timeout,
    cluster,
)
from downpour_deploy.jobs.report import print_json, reported, say
from downpour_deploy.jobs.submit import end_of, submit

if TYPE_CHECKING:
    from downpour.jobs.client import ClusterClient

_CANCEL_S = 60.0
"""Time that a cancelled job has to end, on top of what its script is granted."""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line's root."""
    app.command("submit", context_settings={"allow_interspersed_args": False})(submit)
    for command in (list_, status, logs, wait, cancel, scale, get, nodes, drain):
        app.command(command.__name__.rstrip("_"))(command)


def list_(
    json_: AsJson = False, join: Join = None, keys: Keys = None, security: Security = None, timeout: Timeout = TIMEOUT_S
) -> None:
    """List the cluster's jobs, the newest first.

    Exit code: 0, 2 usage, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour_deploy.jobs.tables import jobs_table

        with cluster(join, keys, security, timeout).client() as client:
            found = client.jobs()
        if json_:
            print_json({"jobs": found})
        else:
            typer.echo("\n".join(jobs_table(found)))


def status(
    job: JobName,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Show how JOB stands, and its processes.

    Exit code: 0 whatever its state, 2 usage or no such job, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour.jobs.status import job_status
        from downpour_deploy.jobs.tables import failure_lines, job_details

        with cluster(join, keys, security, timeout).client() as client:
            found = client.describe(job)
        if json_:
            print_json(found)
            return
        known = job_status(found)
        typer.echo("\n".join(job_details(known)))
        if known.state == "FAILED":
            verdict, *details = failure_lines(known)
            typer.echo("\n".join(["", verdict, *(f"    {line}" for line in details)]))


def logs(
    job: LogsName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Stay until the job has ended.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", metavar="N", min=0, help="Only the last N lines of each process.")
    ] = None,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Print the output of a job's processes, each line with its process in front unless it is one process alone.

    Exit code: 0, 2 usage or no such job, 69 no coordinator, 77 key refused, 101 left with Ctrl-C.
    """
    with reported():
        from downpour.jobs.errors import Unknown
        from downpour.jobs.follow import follow as stay
        from downpour.jobs.follow import read_logs, skip_to_tail
        from downpour.jobs.logs import LogReader, parse_selection
        from downpour.jobs.status import job_status
        from downpour_deploy.jobs.view import View

        name, selection = parse_selection(job)
        with cluster(join, keys, security, timeout).client() as client:
            view = View(sys.stderr, lines=sys.stdout, plain=selection.single, now=client.now)
            if follow:
                try:
                    ended = stay(client, name, view, selection, tail)
                except KeyboardInterrupt:
                    view.detached(name)
                    raise typer.Exit(exitcodes.NOT_FINISHED) from None
                say(f"job {ended.id}: {ended.line()}")
                return
            known = job_status(client.describe(name)).id
            reader = LogReader(selection)
            if tail is not None:
                skip_to_tail(client, known, reader, tail)
            if selection.single and not reader.logs(client.files(known)):
                raise Unknown("log", job, "", "that process has not written anything; `downpour status` lists them")
            read_logs(client, known, reader, view)
            for line in reader.rest():
                view.line(line)


def wait(
    job: JobName,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", min=0, help="Seconds to wait. [default: no limit]")
    ] = None,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = TIMEOUT_S,
) -> None:
    """Wait until JOB has ended.

    Exit code: 0 succeeded, 100 failed, 101 not finished in time (or left with Ctrl-C), 103 cancelled; 2 usage or no
    such job, 69 no coordinator, 77 key refused.
    """
    with reported():
        with cluster(join, keys, security, answer_timeout).client() as client:
            code = _wait(client, job, timeout, json_)
        raise typer.Exit(code)


def _wait(client: ClusterClient, job: str, timeout_s: float | None, json_: bool) -> int:
    from downpour.jobs.errors import NotFinished
    from downpour.jobs.follow import follow
    from downpour_deploy.jobs.view import View

    with View(sys.stderr, now=client.now) as view:
        try:
            return end_of(follow(client, job, view, timeout_s=timeout_s), view, json_)
        except KeyboardInterrupt:
            view.detached(job)
        except NotFinished as error:
            view.stop()
            say(str(error))
        if json_ and view.newest is not None:
            print_json(view.newest.document)
        return exitcodes.NOT_FINISHED


def cancel(
    job: JobName,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it has ended, or at once.")] = True,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """End JOB. Its checkpoints and logs stay.

    Exit code: 0 it has ended (or, with --no-wait, will), 2 usage or no such job, 69 no coordinator, 77 key refused,
    101 it has not ended within a minute more than its grace.
    """
    with reported():
        from downpour.jobs.follow import follow
        from downpour.jobs.status import job_status
        from downpour_deploy.jobs.view import View

        with cluster(join, keys, security, timeout).client() as client:
            found = job_status(client.cancel(job))
            if found.ended:
                say(f"job {found.id} has ended: {found.state}")
            elif wait:
                settings = (found.document.get("spec") or {}).get("settings") or {}
                limit_s = _CANCEL_S + float(settings.get("grace_s") or 0.0)
                with View(sys.stderr, now=client.now) as view:
                    found = follow(client, found.id, view, timeout_s=limit_s)
                say(f"job {found.id}: {found.state}")
            else:
                say(f"job {found.id} is being ended")
        if json_:
            print_json(found.document)


def scale(
    job: JobName,
    workers: Annotated[int, typer.Option("-w", "--workers", metavar="N", min=1, help="Workers from now on.")],
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Change the number of workers of JOB while it runs.

    Exit code: 0, 2 usage, no such job or impossible, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour.jobs.status import job_status

        with cluster(join, keys, security, timeout).client() as client:
            found = job_status(client.scale(job, workers))
        if json_:
            print_json(found.document)
        else:
            typer.echo(f"job {found.id}: {found.workers_wanted} workers wanted, {found.workers} there now")


def get(
    job: JobName,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FOLDER", help="Where to. [default: a folder called as the job]"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Checkpoints, too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there with other content.")] = False,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Fetch model.safetensors, metrics, logs and job.toml of JOB. All of it arrives, or nothing changes.

    Exit code: 0, 2 usage or no such job, 69 no coordinator, 74 files are in the way or cannot be written, 77 key
    refused.
    """
    with reported():
        from downpour.jobs.download import MODEL, download, wanted
        from downpour.jobs.status import job_status
        from downpour_common.sizes import format_bytes
        from downpour_deploy.jobs.tables import count
        from downpour_deploy.jobs.view import meter

        with cluster(join, keys, security, timeout).client() as client:
            known = job_status(client.describe(job))
            files = wanted(client.files(known.id), everything)
            with meter(sys.stderr, "fetching") as progress:
                got = download(client, known.id, files, out or known.id, force, progress)
        for path in got.gone:
            say(f"{path} was removed at the coordinator meanwhile")
        if MODEL not in (*got.written, *got.unchanged):
            say(f"there is no {MODEL}{'' if known.ended else ' yet'}: job {known.id} is {known.state}")
        if json_:
            print_json(
                {
                    "job": known.id,
                    "state": known.state,
                    "folder": got.folder,
                    "written": got.written,
                    "unchanged": got.unchanged,
                    "bytes": got.nbytes,
                }
            )
        else:
            same = f", {count(len(got.unchanged), 'file')} there already" if got.unchanged else ""
            typer.echo(f"{got.folder}: {count(len(got.written), 'file')} ({format_bytes(got.nbytes)}){same}")
