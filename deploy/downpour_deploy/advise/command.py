"""The command line of ``downpour advise``. Parse first; heavy imports come after."""

from __future__ import annotations

from typing import Annotated

import typer

from downpour_deploy.jobs.options import TIMEOUT_S, AnswerTimeout, AsJson, Join, Keys, Security
from downpour_deploy.jobs.report import print_json, reported


def register(app: typer.Typer) -> None:
    """Add the command to the command line's root."""
    app.command("advise")(advise)


def advise(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or job of a cluster.")],
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = TIMEOUT_S,
) -> None:
    """Say what the measures of a run suggest to change, and why.

    Exit code: 0, whatever there is to say; 2 no such thing or nothing measured, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour_deploy.advise.rules import advise as considered
        from downpour_deploy.advise.show import as_document, text
        from downpour_deploy.advise.target import found

        facts, document = found(run, join, keys, security, answer_timeout)
        advice = considered(facts)
        if json_:
            print_json(as_document(facts, advice))
        else:
            typer.echo("\n".join(text(facts, advice, document)))
