"""The command line of ``downpour bench``. Parses first; heavy imports come after."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from downpour_common import exitcodes
from downpour_deploy.jobs.options import AsJson
from downpour_deploy.jobs.report import print_json, reported, say

if TYPE_CHECKING:
    from collections.abc import Callable

bench_app = typer.Typer(help="Measure what you have.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the command to the command line's root."""
    app.add_typer(bench_app, name="bench")


@bench_app.callback()
def _root() -> None:
    """Measure what you have."""


@bench_app.command()
def net(
    address: Annotated[
        str, typer.Argument(metavar="[HOST:PORT]", help="Where the other side listens. [default: this host, loopback]")
    ] = "",
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Be the other side; port 0: a free one.")
    ] = "",
    keys: Annotated[
        str,
        typer.Option(
            "--keys", metavar="FOLDER", help="Encrypt, with keys of `downpour keys`. [default: $DOWNPOUR_KEYS]"
        ),
    ] = "",
    security: Annotated[
        str,
        typer.Option(
            "--security", metavar="curve|none", help="none: no keys. curve, on this host alone: with keys made for it."
        ),
    ] = "",
    model: Annotated[str, typer.Option("--model", metavar="SIZE", help="Estimate a step of such a model.")] = "100MB",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, max=3600.0, help="How long streams are measured in all.")
    ] = 10.0,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.1, help="Seconds of silence that end it.")
    ] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="With --listen: end after one measurement.")] = False,
    json_: AsJson = False,
) -> None:
    """Measure the link between two hosts, with the messages and sockets that training uses.

    On one host: downpour bench net --listen HOST:PORT. On the other: downpour bench net HOST:PORT. Without either,
    both ends are on this host. It says how long a small message takes there and back, what goes through there, back
    and both ways in chunks of several sizes, which size is best, and what a step of a model would wait for. Between
    hosts it needs --keys, or --security none.

    Exit code: 0 measured (or the listening side was ended), 1 the other side fell silent or is busy, 2 usage,
    69 nobody there, 77 key refused, 130 interrupted.
    """
    code = exitcodes.OK
    with reported():
        from downpour_deploy.bench.measure import LinkError

        try:
            if listen:
                _check(address=address)
                _listen(listen, keys, security, once, json_)
            else:
                _check(once=once)
                _ask(address, keys, security, model, seconds, timeout, json_)
        except LinkError as error:
            say(str(error))
            code = error.code
    raise typer.Exit(code)


def _check(address: str = "", once: bool = False) -> None:
    from downpour_common.errors import ConfigError

    if address:
        raise ConfigError(f"--listen and {address} exclude each other: one side listens, the other connects")
    if once:
        raise ConfigError("--once goes with --listen")


def _folder(option: str, address: str, keys: str, security: str, local: bool) -> str | None:
    """The folder of keys for ``address``; None for none. Raises :class:`ConfigError`."""
    from downpour_common.addresses import is_local
    from downpour_common.errors import ConfigError

    if security not in ("", "none", "curve"):
        raise ConfigError(f"--security {security}: expected curve or none")
    if security == "none":
        if keys:
            raise ConfigError("--keys and --security none exclude each other")
        return None
    folder = keys or ("" if local else os.environ.get("DOWNPOUR_KEYS", ""))
    if folder:
        if not os.path.isdir(folder):
            raise ConfigError(f"{'--keys' if keys else 'DOWNPOUR_KEYS'} {folder}: no such folder")
        return folder
    if security == "curve" and not local:
        raise ConfigError("--security curve: give the folder of keys with --keys, or set DOWNPOUR_KEYS")
    if not is_local(address):
        raise ConfigError(
            f"{option}: other hosts can reach it, so it needs keys: give --keys FOLDER (of `downpour keys new`). On a "
            "network where everybody may use up the link: --security none"
        )
    return None


def _listen(where: str, keys: str, security: str, once: bool, json_: bool) -> None:
    from pathlib import Path

    from downpour_common.addresses import parse_address
    from downpour_deploy.bench.identity import server_keys
    from downpour_deploy.bench.listen import listen

    address = parse_address(where, any_port=True)
    folder = _folder(f"--listen {where}", address, keys, security, False)
    accepted, mine = (None, None) if folder is None else server_keys(Path(folder))

    def ready(bound: str) -> None:
        at = bound.removeprefix("tcp://")
        if json_:
            facts = {"address": at, "key": mine.file if mine else None}
            typer.echo(json.dumps(facts))
            return
        lets_in = "anybody, not encrypted"
        if mine is not None and accepted is not None:
            users = sorted(user for public, user in accepted.allowed.items() if public != mine.pair.public)
            lets_in = f"{', '.join(users)}; presenting {mine.file}"
        typer.echo(f"downpour bench net ready: {at}, for {lets_in}")
        typer.echo(f"on the other host: downpour bench net {at}; Ctrl-C ends this")

    over: Callable[[str], None] = (lambda _: None) if json_ else typer.echo
    listen(address, accepted, once, ready, over)


def _ask(where: str, keys: str, security: str, model: str, seconds: float, timeout_s: float, json_: bool) -> None:
    import contextlib
    import signal
    import sys

    from downpour_common.addresses import parse_address
    from downpour_common.config import SENT_CHUNK_BYTES, Settings
    from downpour_common.errors import ConfigError
    from downpour_common.process import keep_freed_memory
    from downpour_common.sizes import parse_bytes
    from downpour_deploy.bench import local, show
    from downpour_deploy.bench.measure import measure
    from downpour_deploy.bench.reach import reached

    try:
        model_bytes = parse_bytes(model)
    except ConfigError as error:
        raise ConfigError(f"--model {error}") from None
    address = parse_address(where) if where else ""
    folder = _folder(where, address or "ipc://", keys, security, not where)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # tidies up what was begun
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if not where:
            if security == "curve" and folder is None:
                folder = stack.enter_context(local.keys_for_now())
            address = stack.enter_context(local.listener(folder))
        link = stack.enter_context(reached(address, folder, timeout_s))
        found = measure(link, seconds, Settings().window_bytes)
    encrypted = folder is not None
    if json_:
        print_json(show.document(found, address.removeprefix("tcp://"), encrypted, model_bytes, SENT_CHUNK_BYTES))
        return
    way = address.removeprefix("tcp://") if where else "both ends on this host, TCP over loopback"
    typer.echo(show.text(found, f"{way}, {'CURVE' if encrypted else 'not encrypted'}", model_bytes, SENT_CHUNK_BYTES))
