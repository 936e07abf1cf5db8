"""The command lines of ``downpour trace`` and ``downpour report``. Parse first; heavy imports come after."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from downpour_deploy.jobs.options import TIMEOUT_S, AnswerTimeout, AsJson, Join, Keys, Security
from downpour_deploy.jobs.report import keep_what_is_there, print_json, reported, say

Where = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or job of a cluster.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
ANSWER_S = TIMEOUT_S


def register(app: typer.Typer) -> None:
    """Add the commands to the command line's root."""
    app.command("trace")(trace)
    app.command("report")(report)


def trace(
    run: Where,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="Where to.")] = "trace.json",
    force: Force = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = ANSWER_S,
) -> None:
    """Write what a job of --trace did when as a file that ui.perfetto.dev and chrome://tracing open.

    Exit code: 0, 2 no such thing or not traced, 69 no coordinator, 74 the file is there already, 77 key refused.
    """
    with reported():
        import json

        from downpour_deploy.trace.chrome import document
        from downpour_deploy.trace.show import remarks
        from downpour_deploy.trace.target import opened

        keep_what_is_there(out, force)
        with opened(run, join, keys, security, answer_timeout) as found:
            with open(out, "w", encoding="utf-8") as file:
                json.dump(document(found), file, allow_nan=False, separators=(",", ":"))
            for line in remarks(found):
                say(line)
            spans = sum(len(each.spans) for each in found.processes)
            typer.echo(f"{out}: {spans} spans of {len(found.processes)} processes; open it at https://ui.perfetto.dev")


def report(
    run: Where,
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FILE", help="Draw the steps as well: FILE.svg or FILE.html.")
    ] = None,
    first: Annotated[
        int | None,
        typer.Option("--from", metavar="STEP", min=0, help="First step to draw. [default: in the middle]"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps to draw.")] = 1,
    force: Force = False,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = ANSWER_S,
) -> None:
    """Say what the workers of a job of --trace spent their time on, what they held and moved, and draw some steps.

    Exit code: 0, 2 no such thing, not traced or no such step, 69 no coordinator, 74 the file is there already, 77 key
    refused.
    """
    with reported():
        from downpour_deploy.trace.lanes import draw
        from downpour_deploy.trace.measure import measure, window
        from downpour_deploy.trace.picture import picture
        from downpour_deploy.trace.show import as_document, remarks, text
        from downpour_deploy.trace.target import opened

        if out is not None:
            keep_what_is_there(out, force)
        with opened(run, join, keys, security, answer_timeout) as found:
            measured = measure(found)
            part = window(found, first, steps)
            if out is not None:
                with open(out, "w", encoding="utf-8") as file:
                    file.write(picture(found, measured, part, html=not out.endswith(".svg")))
            for line in remarks(found):
                say(line)
            if json_:
                print_json(as_document(found, measured))
            else:
                wide = os.get_terminal_size().columns if sys.stdout.isatty() else 100
                typer.echo("\n".join([*draw(part, wide, coloured=sys.stdout.isatty()), "", *text(measured)]))
                if out is not None:
                    typer.echo(f"\n{out}: {part.title}")
