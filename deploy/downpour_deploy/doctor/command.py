"""The command line of ``downpour doctor``. Parses first; heavy imports come after."""

from __future__ import annotations

from typing import Annotated

import typer

from downpour_deploy.jobs.options import TIMEOUT_S, AsJson, Timeout
from downpour_deploy.jobs.report import print_json, reported


def register(app: typer.Typer) -> None:
    """Add the command to the command line's root."""
    app.command("doctor")(doctor)


def doctor(
    join: Annotated[
        str,
        typer.Option(
            "--join", metavar="HOST:PORT", help="The coordinator. [default: $DOWNPOUR_COORDINATOR, else none]"
        ),
    ] = "",
    keys: Annotated[
        str, typer.Option("--keys", metavar="FOLDER", help="This host's keys. [default: $DOWNPOUR_KEYS]")
    ] = "",
    security: Annotated[str, typer.Option("--security", metavar="curve|none", help="none: no keys.")] = "",
    role: Annotated[
        str, typer.Option("--role", metavar="user|server|worker", help="What this host is, or is to be.")
    ] = "user",
    data_dir: Annotated[
        str, typer.Option("--data-dir", metavar="DIR", help="Where jobs' files will be. [default: a temporary folder]")
    ] = "",
    timeout: Timeout = TIMEOUT_S,
    json_: AsJson = False,
) -> None:
    """Check this host and the way to the coordinator; say what to do about what is wrong.

    Without --join, only what can be seen from here. It changes nothing, and sends at most 64 MiB in 3 s.

    Exit code: 0 nothing failed, 1 a check failed, 2 usage, 69 no coordinator there, 77 key refused.
    """
    with reported():
        from downpour_deploy.doctor.gather import Options, gather
        from downpour_deploy.doctor.judge import judge, skipped
        from downpour_deploy.doctor.show import document, text
        from downpour_deploy.doctor.verdict import exit_code

        facts = gather(Options(join, keys, security, role, data_dir, timeout))
        verdicts = judge(facts)
        left_out = skipped(facts, verdicts)
        if json_:
            print_json(document(verdicts, left_out))
        else:
            typer.echo(text(verdicts, left_out))
    raise typer.Exit(exit_code(verdicts))
