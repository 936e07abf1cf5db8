"""``downpour server`` and ``downpour worker``. Parses first; heavy imports come after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from downpour_common import exitcodes
from downpour_common.errors import ConfigError, DownpourError

if TYPE_CHECKING:
    from downpour_deploy.agent.start import Options

server_app = typer.Typer(help="Have this host run parameter-server shards of a cluster.", no_args_is_help=True)
worker_app = typer.Typer(help="Have this host run workers of a cluster.", no_args_is_help=True)

Join = Annotated[
    str, typer.Option("--join", envvar="DOWNPOUR_COORDINATOR", metavar="HOST:PORT", help="The coordinator.")
]
Keys = Annotated[
    str, typer.Option("--keys", envvar="DOWNPOUR_KEYS", metavar="DIR", help="Folder of `downpour keys new`.")
]
Security = Annotated[str, typer.Option("--security", help="none: join another host without keys. Anybody can, then.")]
Name = Annotated[str, typer.Option("--name", help="Name of this node, [a-z0-9-]. [default: from the host's name]")]
Label = Annotated[list[str] | None, typer.Option("--label", metavar="K=V", help="What jobs can ask for. Repeatable.")]
DataDir = Annotated[
    str, typer.Option("--data-dir", metavar="DIR", help="Where jobs' files are. [default: a temporary folder]")
]
Grace = Annotated[float, typer.Option("--grace", min=0, help="Seconds to end in good order when this is stopped.")]
Orphan = Annotated[
    float,
    typer.Option("--orphan-timeout", min=1, help="Seconds without the coordinator after which processes are ended."),
]
StartTimeout = Annotated[
    float, typer.Option("--start-timeout", min=0, help="Seconds to wait for the coordinator at first; 0: for ever.")
]
Json = Annotated[bool, typer.Option("--json", help="The readiness line as a JSON object.")]


@server_app.callback()
def _server() -> None:
    """Have this host run parameter-server shards of a cluster."""


@worker_app.callback()
def _worker() -> None:
    """Have this host run workers of a cluster."""


@server_app.command("start")
def server_start(
    join: Join,
    keys: Keys = "",
    security: Security = "",
    name: Name = "",
    label: Label = None,
    memory: Annotated[str, typer.Option("--memory", help="For shards, e.g. 8GiB. [default: 80 % of the host's]")] = "",
    advertise: Annotated[
        str, typer.Option("--advertise", metavar="IP", help="Where others reach shards. [default: as the route says]")
    ] = "",
    bind: Annotated[
        str, typer.Option("--bind", metavar="IP", help="Interface that shards listen on. [default: the advertised]")
    ] = "",
    data_dir: DataDir = "",
    grace: Grace = 8.0,
    orphan_timeout: Orphan = 900.0,
    start_timeout: StartTimeout = 0.0,
    json_: Json = False,
) -> None:
    """Join the coordinator and run shards of its jobs on this host, until stopped.

    Prints one line when the node has joined. Stop it with SIGTERM or Ctrl-C.

    Exit code: 0 stopped, 2 usage, 69 no coordinator within --start-timeout, 74 files, 77 turned down.
    """
    from downpour_deploy.agent.start import Options

    _run(
        Options(
            role="server",
            join=join,
            keys=keys,
            security=security,
            name=name,
            labels=tuple(label or ()),
            data_dir=data_dir,
            grace_s=grace,
            orphan_s=orphan_timeout,
            start_timeout_s=start_timeout,
            json=json_,
            memory=memory,
            advertise=advertise,
            bind=bind,
        )
    )


@worker_app.command("start")
def worker_start(
    join: Join,
    keys: Keys = "",
    security: Security = "",
    name: Name = "",
    label: Label = None,
    slots: Annotated[
        str, typer.Option("--slots", help="Workers at a time; auto: one per GPU, else one per core.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto | cpu | cuda.")] = "auto",
    data_dir: DataDir = "",
    grace: Grace = 8.0,
    orphan_timeout: Orphan = 900.0,
    start_timeout: StartTimeout = 0.0,
    json_: Json = False,
) -> None:
    """Join the coordinator and run workers of its jobs on this host, until stopped.

    Prints one line when the node has joined. Stop it with SIGTERM or Ctrl-C: workers leave in good order.

    Exit code: 0 stopped, 2 usage, 69 no coordinator within --start-timeout, 74 files, 77 turned down.
    """
    from downpour_deploy.agent.start import Options

    _run(
        Options(
            role="worker",
            join=join,
            keys=keys,
            security=security,
            name=name,
            labels=tuple(label or ()),
            data_dir=data_dir,
            grace_s=grace,
            orphan_s=orphan_timeout,
            start_timeout_s=start_timeout,
            json=json_,
            slots=slots,
            device=device,
        )
    )


def _run(options: Options) -> None:
    from downpour_deploy.agent.start import start

    try:
        code = start(options)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"downpour: {problem}", err=True)
        code = exitcodes.USAGE
    except OSError as error:
        typer.echo(f"downpour: {error.filename or 'data folder'}: {error.strerror or error}", err=True)
        code = exitcodes.IO_ERROR
    except DownpourError as error:
        typer.echo(f"downpour: {error}", err=True)
        code = exitcodes.FAILED
    raise typer.Exit(code)
