"""``downpour submit``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from downpour_common import exitcodes
from downpour_deploy.jobs.options import TIMEOUT_S, AsJson, Join, Keys, ResumeJob, Security, Timeout, cluster
from downpour_deploy.jobs.report import print_json, reported, say
from downpour_deploy.mode_options import MODE_HELP, Compress, GroupMode, Rule, Target
from downpour_deploy.replica_options import Interleave, Microbatches, Pipeline, ScheduleOption, Tensor

if TYPE_CHECKING:
    from downpour.jobs.client import ClusterClient
    from downpour.jobs.status import JobStatus
    from downpour_deploy.jobs.view import View


def submit(
    script: Annotated[str, typer.Argument(help="The training script, or a job file (.toml).")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[
        int | None, typer.Option("-w", "--workers", metavar="N", help="Workers. [default: 1]", show_default=False)
    ] = None,
    shards: Annotated[
        int | None, typer.Option("-s", "--shards", metavar="N", help="Parameter-server shards. [default: 1]")
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help=f"{MODE_HELP} [default: async]")] = None,
    group_mode: GroupMode = None,
    rule: Rule = None,
    compress: Compress = None,
    target: Target = None,
    device: Annotated[
        str | None, typer.Option("--device", help="What downpour.device() gives: auto | cpu | cuda. [default: auto]")
    ] = None,
    threads: Annotated[
        str | None, typer.Option("--threads", help="OMP_NUM_THREADS of each process. [default: auto, per host]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Order of data and randomness of workers. [default: 0]")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Job name, [a-z0-9-]. [default: from the script]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, key=value; see `downpour settings`. Repeatable.")
    ] = None,
    min_workers: Annotated[
        int | None, typer.Option("--min-workers", metavar="N", help="Fewest workers to go on with. [default: all]")
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option("--restarts", metavar="N", help="How often what was lost is started again. [default: 0]"),
    ] = None,
    replication: Annotated[
        int | None,
        typer.Option("--replication", min=1, max=2, metavar="1|2", help="2: a backup for each shard. [default: 1]"),
    ] = None,
    tensor: Tensor = None,
    pipeline: Pipeline = None,
    schedule: ScheduleOption = None,
    microbatches: Microbatches = None,
    interleave: Interleave = None,
    on_nan: Annotated[
        str | None,
        typer.Option("--on-nan", help="NaN or Inf in gradients: fail | skip | quarantine | rollback. [default: fail]"),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Record what each worker does when; see `downpour report`.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="K=V", help="A variable of the job's processes. Repeatable.")
    ] = None,
    shard_memory: Annotated[
        str | None, typer.Option("--shard-memory", metavar="SIZE", help="What a shard needs, such as 2GiB.")
    ] = None,
    worker_label: Annotated[
        list[str] | None,
        typer.Option("--worker-label", metavar="K=V", help="Workers only on nodes with this label. Repeatable."),
    ] = None,
    server_label: Annotated[
        list[str] | None,
        typer.Option("--server-label", metavar="K=V", help="Shards only on nodes with this label. Repeatable."),
    ] = None,
    folder: Annotated[
        str | None, typer.Option("--folder", help="The folder that is sent. [default: the script's]")
    ] = None,
    resume: ResumeJob = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Queue the job even if the cluster is too small for it today.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the job, what would be sent and where it would run; start nothing.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Stay and show the output, or only print the job's id.")
    ] = False,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Send SCRIPT with its folder to a cluster and train it there.

    Options for downpour come before SCRIPT, everything after it goes to the script. Prints the job's id.

    Exit code: 0 submitted, 2 usage or refused, 69 no coordinator, 77 key refused, 78 bad job file. With --follow: 0
    succeeded, 100 failed, 101 not finished (Ctrl-C leaves the job running), 103 cancelled.
    """
    with reported():
        from downpour.jobs.errors import BadJobFile, JobRefused
        from downpour.jobs.submission import describe
        from downpour_common.messages import Refusal

        fields: dict[str, Any] = {
            "args": tuple(args) if args else None,
            "workers": workers,
            "shards": shards,
            "mode": mode,
            "rule": rule,
            "compress": compress,
            "target": target,
            "device": device,
            "seed": seed,
            "name": name,
            "min_workers": min_workers,
            "restarts": restarts,
            "replication": replication,
            "tensor": tensor,
            "pipeline": pipeline,
            "schedule": schedule,
            "microbatches": microbatches,
            "interleave": interleave,
            "shard_memory": shard_memory,
            "folder": folder,
            "trace": trace or None,
            "resume": resume,
        }
        where = cluster(join, keys, security, timeout)
        problems = list(where.problems())
        settings = [*(settings or ()), f"on_nan={on_nan}"] if on_nan is not None else settings
        lists = {"settings": settings, "env": env, "worker_labels": worker_label, "server_labels": server_label}
        fields |= _parsed(lists, threads, problems)
        spec, sent_folder = describe(script, fields, tuple(problems), group_mode or ())
        try:
            code = _submit(spec, sent_folder, where, anyway, dry_run, follow, json_)
        except JobRefused as error:
            if script.endswith(".toml") and error.code == Refusal.UNUSABLE:
                raise BadJobFile(error.reason) from None
            raise
        raise typer.Exit(code)


def _parsed(lists: dict[str, list[str] | None], threads: str | None, problems: list[str]) -> dict[str, Any]:
    """What comes as text, as fields of a JobSpec; what cannot be read goes to ``problems``."""
    from downpour_common.config import parse_env, parse_labels, parse_settings
    from downpour_common.errors import ConfigError

    parsers: dict[str, Callable[[list[str]], Any]] = {
        "settings": parse_settings,
        "env": parse_env,
        "worker_labels": lambda texts: parse_labels("--worker-label", texts),
        "server_labels": lambda texts: parse_labels("--server-label", texts),
    }
    fields: dict[str, Any] = {}
    for key, texts in lists.items():
        try:
            fields[key] = parsers[key](texts) if texts else None
        except ConfigError as error:
            problems += error.problems
    if threads is not None and not (threads == "auto" or (threads.isdecimal() and int(threads) > 0)):
        problems.append(f"--threads {threads}: expected a positive number, or auto")
    else:
        fields["threads"] = None if threads is None else 0 if threads == "auto" else int(threads)
    return fields


def _submit(spec: Any, folder: str, where: Any, anyway: bool, dry_run: bool, follow: bool, json_: bool) -> int:
    from downpour.jobs.status import job_status
    from downpour.jobs.submission import packed, send
    from downpour_common.config import to_toml
    from downpour_common.replicas import counted
    from downpour_deploy.jobs.tables import count, dry_run_lines, placement_lines
    from downpour_deploy.jobs.view import meter

    with packed(spec, folder) as submission, where.client() as client:
        if dry_run:
            local = submission.document()
            if not json_:
                typer.echo(to_toml(spec))
                typer.echo("\n".join(dry_run_lines(local)))
            answer = send(client, submission, anyway, dry_run=True)
            if json_:
                print_json({**local, **answer})
            else:
                typer.echo("\n" + "\n".join(placement_lines(answer)))
            return exitcodes.OK
        try:
            with meter(sys.stderr, "sending") as progress:
                status = job_status(send(client, submission, anyway, progress=progress))
        except KeyboardInterrupt:
            say("whether the job was accepted shows in `downpour list`")
            raise
        if follow:
            return stay(client, status.id, json_)
        if json_:
            print_json(status.document)
        else:
            typer.echo(status.id)
        say(
            f"job {status.id}: {counted(spec.workers, spec.ranks)}, {count(spec.shards, 'shard')}, mode {spec.mode}; "
            f"{status.line()}. Its output: downpour logs -f {status.id}"
        )
        return exitcodes.OK


def stay(client: ClusterClient, job: str, json_: bool) -> int:
    """Follow ``job`` to its end on the screen; the exit code."""
    from downpour.jobs.follow import follow
    from downpour.jobs.logs import Selection
    from downpour_deploy.jobs.view import View

    with View(sys.stderr if json_ else sys.stdout, now=client.now) as view:
        try:
            status = follow(client, job, view, Selection())
        except KeyboardInterrupt:
            view.detached(job)
            if json_ and view.newest is not None:
                print_json(view.newest.document)
            return exitcodes.NOT_FINISHED
        return end_of(status, view, json_)


def end_of(status: JobStatus, view: View, json_: bool) -> int:
    """Report on a job that has ended; the exit code."""
    view.finish(status)
    if json_:
        print_json(status.document)
    ends = {"SUCCEEDED": exitcodes.OK, "CANCELLED": exitcodes.JOB_CANCELLED}
    return ends.get(status.state, exitcodes.JOB_FAILED)
