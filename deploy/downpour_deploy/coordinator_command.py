"""``downpour coordinator start``: the control plane of a cluster as a daemon."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from downpour_common import exitcodes

if TYPE_CHECKING:
    from downpour_common.keys import ServerKeys

UNREAD_ANSWERS = 256
"""Answers kept for a client that does not read; honest ones have fewer requests open, and repeat what is lost."""

coordinator_app = typer.Typer(
    help="The control plane of a cluster: jobs, placement, checkpoints.", no_args_is_help=True, rich_markup_mode=None
)


@coordinator_app.callback()
def _root() -> None:
    """The control plane of a cluster: jobs, placement, checkpoints."""


@coordinator_app.command()
def start(
    bind: Annotated[str, typer.Option("--bind", help="HOST:PORT to listen on; port 0: a free one.")] = "127.0.0.1:7070",
    keys: Annotated[
        str | None, typer.Option("--keys", envvar="DOWNPOUR_KEYS", help="Folder of `downpour keys new`.")
    ] = None,
    security: Annotated[
        str | None, typer.Option("--security", help="none: no keys and no encryption, for networks you trust.")
    ] = None,
    data_dir: Annotated[
        str, typer.Option("--data-dir", help="Where jobs, their results and the journal are kept.")
    ] = "downpour-data",
    node_timeout_s: Annotated[
        float, typer.Option("--node-timeout", min=2.0, help="Seconds of silence after which a host counts as lost.")
    ] = 10.0,
    copies_to: Annotated[
        list[str] | None,
        typer.Option("--copies-to", metavar="URL", help="Jobs' checkpoint_url may be this or below. Repeatable."),
    ] = None,
    no_fsync: Annotated[
        bool, typer.Option("--no-fsync", help="Do not wait for the disk: faster, safe against crashes, not power cuts.")
    ] = False,
) -> None:
    """Run the coordinator until it is ended. Started again in the same data folder it goes on with all jobs.

    SIGHUP: read the folder of keys again, so that a new .pub is let in and a removed one no longer.

    Exit code: 0 ended by a signal, 2 usage (or the address or folder cannot be used).
    """
    from downpour_common.errors import ConfigError, DownpourError

    try:
        code = _serve(bind, keys, security, data_dir, node_timeout_s, not no_fsync, tuple(copies_to or ()))
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"downpour: {problem}", err=True)
        code = exitcodes.USAGE
    except DownpourError as error:
        typer.echo(f"downpour: {error}", err=True)
        code = exitcodes.FAILED
    raise typer.Exit(code)


def _serve(
    bind: str,
    keys: str | None,
    security: str | None,
    data_dir: str,
    node_timeout_s: float,
    durable: bool,
    copies_to: tuple[str, ...],
) -> int:
    from downpour_common.addresses import is_local, parse_address
    from downpour_common.errors import ConfigError

    if security not in (None, "none", "curve"):
        raise ConfigError(f"--security {security}: known is none; leave it out to use keys")
    address = parse_address(bind, any_port=True)
    wanted = security != "none"
    if wanted and keys is None and not is_local(address):
        raise ConfigError(
            f"--bind {bind}: other hosts can reach it, so it needs keys: make them with `downpour keys new --dir keys` "
            "and give --keys keys. On a network where everybody may run code on your cluster: --security none"
        )
    server_keys = _keys(keys) if wanted and keys is not None else None
    if server_keys is None:
        why = "--security none" if not wanted else "no --keys, so it listens on this host only"
        _tell(f"WARNING: no keys, no encryption ({why}): whoever can connect can run code in this cluster")
    for url in copies_to:
        from downpour_coordinator.urls import check_url

        check_url(url)
    return _run(address, server_keys, keys or "", data_dir, node_timeout_s, durable, copies_to)


def _keys(folder: str) -> ServerKeys:
    from pathlib import Path

    from downpour_common.keys import ServerKeys, authorized, load_pair
    from downpour_common.transport.zeromq import public_of

    pair = load_pair(Path(folder), "coordinator", public_of=public_of)
    return ServerKeys(pair, authorized(Path(folder)))


def _reload(folder: str, keys: ServerKeys) -> None:
    """Let in whom the folder names now. Keys of jobs stay; a folder that cannot be read changes nothing."""
    from pathlib import Path

    from downpour_common.errors import ConfigError
    from downpour_common.keys import authorized

    try:
        named = authorized(Path(folder))
    except ConfigError as error:
        _tell(f"the keys stay as they were: {error}")
        return
    gone = [public for public, user in keys.allowed.items() if public not in named and not user.startswith("job/")]
    for public in gone:
        del keys.allowed[public]
    keys.allowed.update(named)
    _tell(f"keys of {folder} read again: {len(named)} are let in, {len(gone)} no longer")


def _run(
    address: str,
    keys: ServerKeys | None,
    folder: str,
    data_dir: str,
    node_timeout_s: float,
    durable: bool,
    copies_to: tuple[str, ...],
) -> int:
    import asyncio
    import resource
    import signal

    import uvloop

    from downpour_common import failpoints
    from downpour_common.transport.zeromq import ZmqServer, new_key_pair
    from downpour_common.wire import CONTROL_HEADER_LIMIT
    from downpour_coordinator.daemon import CoordinatorDaemon
    from downpour_coordinator.files import Files
    from downpour_coordinator.journal import Journal
    from downpour_deploy.notify import notify

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a descriptor
    failpoints.arm("coordinator")
    files = Files(data_dir)
    journal = Journal(os.path.join(files.data_dir, "coordinator.db"), durable)

    async def serve() -> None:
        transport = ZmqServer(address, CONTROL_HEADER_LIMIT, keys, UNREAD_ANSWERS)
        try:
            make = new_key_pair if keys is not None else None
            daemon = CoordinatorDaemon(transport, files, journal, keys, make, node_timeout_s, _tell, copies_to)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, daemon.stop)
            if keys is not None:
                loop.add_signal_handler(signal.SIGHUP, _reload, folder, keys)
            where = transport.address.removeprefix("tcp://")
            print(f"downpour coordinator ready: {where}, data in {files.data_dir}", flush=True)  # noqa: T201
            notify("READY=1", f"STATUS=listening on {where}")
            await daemon.run()
            notify("STOPPING=1")
        finally:
            transport.close()

    try:
        uvloop.run(serve())
    finally:
        journal.close()
    return exitcodes.OK


def _tell(text: str) -> None:
    """A line for the log of the daemon, with the time where no service manager adds it."""
    from datetime import datetime

    stamp = "" if "JOURNAL_STREAM" in os.environ else datetime.now().astimezone().isoformat(timespec="seconds") + " "
    print(f"{stamp}coordinator: {text}", file=sys.stderr, flush=True)  # noqa: T201
