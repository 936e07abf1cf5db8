"""The command line. Parses first; heavy imports come after."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from downpour_common import exitcodes
from downpour_common.errors import ConfigError, DownpourError

app = typer.Typer(
    name="downpour",
    help="Parameter-server training for PyTorch scripts.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Parameter-server training for PyTorch scripts."""


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(help="The training script; it calls downpour.prepare.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[str, typer.Option("-w", "--workers", help="Workers: a number, or auto: one per core.")] = "auto",
    shards: Annotated[int, typer.Option("-s", "--shards", help="Parameter-server shards.")] = 1,
    mode: Annotated[str, typer.Option("--mode", help="async | ssp:S (S clocks of slack) | sync.")] = "async",
    device: Annotated[str, typer.Option("--device", help="What downpour.device() gives: auto | cpu | cuda.")] = "auto",
    threads: Annotated[str, typer.Option("--threads", help="OMP_NUM_THREADS of each process, or auto.")] = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", help="Order of data and randomness of workers. [default: 0]")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Run directory. [default: runs/NAME-TIME]")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on from this run directory or checkpoint.")] = None,
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
    from downpour_deploy.resolve import Wishes, resolve
    from downpour_deploy.run import run_job

    try:
        wishes = Wishes(
            script=script,
            args=tuple(args or ()),
            workers=workers,
            shards=shards,
            mode=mode,
            device=device,
            threads=threads,
            seed=seed,
            out=out,
            resume=resume,
            settings=tuple(settings or ()),
            name=name,
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
    app(prog_name="downpour", args=sys.argv[1:])
