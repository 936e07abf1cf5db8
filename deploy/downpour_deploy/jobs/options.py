"""Options and arguments that several commands have, and the completion of names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from downpour.jobs.api import Cluster

TIMEOUT_S = 10.0
"""How long a command waits for an answer, unless told otherwise."""
_COMPLETION_S = 0.5
"""Longer than that nobody waits for a completion."""


def cluster(join: str | None, keys: str | None, security: str | None, timeout: float) -> Cluster:
    """The cluster that the options name."""
    from downpour.jobs.api import Cluster

    return Cluster(join, keys, security, timeout)


def _complete_jobs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids of jobs; names as well, when one has been begun."""
    found = {}
    for document in _asked(ctx, "jobs"):
        if incomplete:
            found[str(document.get("name", ""))] = "its newest job"
        found[str(document.get("job", ""))] = f"{document.get('name', '')} {document.get('state', '')}"
    return [entry for entry in found.items() if entry[0].startswith(incomplete)]


def _complete_nodes(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of nodes."""
    found = [(str(d.get("node", "")), f"{d.get('role', '')} {d.get('state', '')}") for d in _asked(ctx, "nodes")]
    return [entry for entry in found if entry[0].startswith(incomplete)]


def _asked(ctx: typer.Context, what: str) -> list[dict[str, object]]:
    """Documents from the coordinator; none when anything is wrong, since a completion must not write to the screen."""
    from downpour.jobs.client import ClusterClient
    from downpour_common.errors import DownpourError

    given = ctx.params
    try:
        with ClusterClient(given.get("join"), given.get("keys"), given.get("security"), _COMPLETION_S) as client:
            return client.jobs() if what == "jobs" else list(client.nodes().get("nodes", []))
    except (DownpourError, OSError):
        return []


Join = Annotated[
    str | None,
    typer.Option("--join", metavar="HOST:PORT", help="The coordinator. [default: $DOWNPOUR_COORDINATOR]"),
]
Keys = Annotated[
    str | None,
    typer.Option("--keys", metavar="FOLDER", help="Where user.key and coordinator.pub are. [default: $DOWNPOUR_KEYS]"),
]
Security = Annotated[
    str | None,
    typer.Option("--security", metavar="curve|none", help="none: no keys, although it is another host."),
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="S", min=0.1, help="Seconds to wait for an answer of the coordinator.")
]
AnswerTimeout = Annotated[
    float,
    typer.Option("--answer-timeout", metavar="S", min=0.1, help="Seconds to wait for the coordinator's first answer."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")]
JobName = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Id, beginning of one, or name (its newest job).", autocompletion=_complete_jobs
    ),
]
LogsName = Annotated[
    str,
    typer.Argument(
        metavar="JOB[/ROLE[/N]]",
        help="Which job's output; of its workers or servers alone: JOB/worker; of one: JOB/worker/3.",
        autocompletion=_complete_jobs,
    ),
]
NodeName = Annotated[
    str, typer.Argument(metavar="NODE", help="As `downpour nodes` lists it.", autocompletion=_complete_nodes)
]
ResumeJob = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="JOB",
        help="Go on from the newest checkpoint of an earlier job of the cluster.",
        autocompletion=_complete_jobs,
    ),
]
