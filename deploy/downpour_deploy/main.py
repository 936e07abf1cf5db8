"""The command line. Parses first; heavy imports come after."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from downpour_common import exitcodes
from downpour_common.errors import ConfigError, DownpourError
from downpour_deploy.mode_options import MODE_HELP, Compress, GroupMode, Rule, Target
from downpour_deploy.replica_options import Interleave, Microbatches, Pipeline, ScheduleOption, Tensor

app = typer.Typer(
    name="downpour",
    help="Parameter-server training for PyTorch scripts.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add_commands() -> None:
    """Commands of a cluster. What they need is imported when they run."""
    from downpour_deploy.advise import register as add_advise
    from downpour_deploy.agent.command import server_app, worker_app
    from downpour_deploy.bench import register as add_bench
    from downpour_deploy.change import register as add_change
    from downpour_deploy.checkpoint import checkpoint_app
    from downpour_deploy.coordinator_command import coordinator_app
    from downpour_deploy.doctor import register as add_doctor
    from downpour_deploy.jobs import register
    from downpour_deploy.keys_command import keys_app
    from downpour_deploy.trace import register as add_trace
    from downpour_deploy.tune import register as add_tune

    register(app)
    add_change(app)
    add_doctor(app)
    add_bench(app)
    add_tune(app)
    add_trace(app)
    add_advise(app)
    app.add_typer(coordinator_app, name="coordinator")
    app.add_typer(server_app, name="server")
    app.add_typer(worker_app, name="worker")
    app.add_typer(keys_app, name="keys")
    app.add_typer(checkpoint_app, name="checkpoint")


@app.callback()
def _root() -> None:
    """Parameter-server training for PyTorch scripts."""


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(help="The training script; it calls downpour.prepare.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[str, typer.Option("-w", "--workers", help="Workers: a number, or auto: one per core.")] = "auto",
    shards: Annotated[int, typer.Option("-s", "--shards", help="Parameter-server shards.")] = 1,
    mode: Annotated[str, typer.Option("--mode", help=MODE_HELP)] = "async",
    group_mode: GroupMode = None,
    rule: Rule = None,
    compress: Compress = None,
    target: Target = None,
    device: Annotated[str, typer.Option("--device", help="What downpour.device() gives: auto | cpu | cuda.")] = "auto",
    threads: Annotated[str, typer.Option("--threads", help="OMP_NUM_THREADS of each process, or auto.")] = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", help="Order of data and randomness of workers. [default: 0]")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Run directory. [default: runs/NAME-TIME]")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on from this run directory, checkpoint or URL.")
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts", min=0, metavar="N", help="Replace lost workers and shards, or begin again, at most N times."
        ),
    ] = 0,
    replication: Annotated[
        int, typer.Option("--replication", min=1, max=2, metavar="1|2", help="2: a backup for each shard; see guide.")
    ] = 1,
    tensor: Tensor = None,
    pipeline: Pipeline = None,
    schedule: ScheduleOption = None,
    microbatches: Microbatches = None,
    interleave: Interleave = None,
    on_nan: Annotated[
        str | None,
        typer.Option("--on-nan", help="NaN or Inf in gradients: fail | skip | quarantine | rollback. [default: fail]"),
    ] = None,
    chaos: Annotated[
        str, typer.Option("--chaos", help="Kill, stop or slow its processes: kill:server/0@30s,stop:worker@10s±5+2s …")
    ] = "",
    trace: Annotated[
        bool, typer.Option("--trace", help="Record what each worker does when; see `downpour report`.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, key=value; see `downpour settings`. Repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Job name, [a-z0-9-]. [default: from the script]")] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout at the end; all else on stderr.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress, only the scripts' output and the result.")
    ] = False,
) -> None:
    """Train SCRIPT on this machine with workers and parameter-server shards.

    Options for downpour come before SCRIPT, everything after it goes to the script.

    Exit code: 0 success, the failed script's own, 2 usage, 74 results not written, 130 interrupted.
    With --json, errors of usage leave stdout empty.
    """
    from downpour_common.modes import with_groups
    from downpour_deploy.resolve import Wishes, resolve
    from downpour_deploy.run import run_job

    try:
        wishes = Wishes(
            script=script,
            args=tuple(args or ()),
            workers=workers,
            shards=shards,
            mode=with_groups(mode, group_mode or ()),
            device=device,
            threads=threads,
            seed=seed,
            out=out,
            resume=resume,
            settings=tuple(settings or ()),
            name=name,
            restarts=restarts,
            on_nan=on_nan,
            replication=replication,
            chaos=chaos,
            tensor=tensor,
            pipeline=pipeline,
            schedule=schedule,
            microbatches=microbatches,
            interleave=interleave,
            trace=trace,
            rule=rule,
            compress=compress,
            target=target,
        )
        code = run_job(resolve(wishes), json_output=json_, quiet=quiet)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"downpour: {problem}", err=True)
        code = exitcodes.USAGE
    except OSError as error:
        typer.echo(f"downpour: {error.filename or 'run directory'}: {error.strerror or error}", err=True)
        code = exitcodes.IO_ERROR
    except DownpourError as error:
        typer.echo(f"downpour: {error}", err=True)
        code = exitcodes.FAILED
    raise typer.Exit(code)


@app.command()
def settings() -> None:
    """List what --set can change, with defaults."""
    from downpour_common.config import Settings

    for key, field in Settings.model_fields.items():
        typer.echo(f"{key:<18} {field.default!s:<10} {field.description}")


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as of

    typer.echo(of("downpour-ps"))


def main() -> None:
    """Entry point of the console script."""
    _add_commands()
    app(prog_name="downpour", args=sys.argv[1:])
