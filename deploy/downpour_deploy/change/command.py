"""The command line of ``downpour set``. Parses first; heavy imports come after."""

from __future__ import annotations

from typing import Annotated

import typer

from downpour_deploy.jobs.options import TIMEOUT_S, AnswerTimeout, AsJson, Join, Keys, Security
from downpour_deploy.jobs.report import print_json, reported, say


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("set")(set_)


def set_(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Run directory of `downpour run`, or job of a cluster.")],
    assignments: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE…", help="mode, target, compress, or what --set of `run` takes.")
    ],
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0, help="Seconds to wait until it trains with it.")
    ] = 300.0,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = TIMEOUT_S,
) -> None:
    """Change the mode or settings of JOB while it runs: it takes a checkpoint, and goes on from it with the change.

    All its processes begin again, which counts as no restart. If the job does not come to its first step with the
    change, the change is taken back.

    Exit code: 0 it trains with the change, 1 the change was taken back or the job ended before, 2 usage, no such job or
    impossible, 69 no coordinator, 77 key refused, 101 not done in time (it may be later).
    """
    with reported():
        from downpour_common import exitcodes
        from downpour_deploy.change.wait import await_change, exit_code
        from downpour_deploy.checkpoint.target import asked

        with asked(job, join, keys, security, answer_timeout) as (client, name):
            found = await_change(client, name, tuple(assignments), timeout)
        code = exit_code(found)
        if json_:
            print_json(found)
        elif code == exitcodes.OK:
            whence = f", from checkpoint {found['number']} on" if found["number"] else "; nothing had to change"
            typer.echo(f"job {found['job']}: {', '.join(assignments)}{whence}")
        elif code == exitcodes.FAILED:
            say(f"job {found['job']}: the change is not in force: {found['error']}")
        else:
            say(f"job {found['job']}: it does not train with the change yet after {timeout:g} s; it may later")
    raise typer.Exit(code)
