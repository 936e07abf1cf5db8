"""``downpour nodes`` and ``downpour drain``."""

from __future__ import annotations

from typing import Annotated

import typer

from downpour_deploy.jobs.options import TIMEOUT_S, AsJson, Join, Keys, NodeName, Security, Timeout, cluster
from downpour_deploy.jobs.report import print_json, reported


def nodes(
    json_: AsJson = False, join: Join = None, keys: Keys = None, security: Security = None, timeout: Timeout = TIMEOUT_S
) -> None:
    """List the cluster's hosts and what runs on them.

    Exit code: 0, 2 usage, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour_deploy.jobs.tables import nodes_table

        with cluster(join, keys, security, timeout).client() as client:
            found = client.nodes()
        if json_:
            print_json(found)
        else:
            typer.echo("\n".join(nodes_table(found)))


def drain(
    node: NodeName,
    undo: Annotated[bool, typer.Option("--undo", help="Use it again.")] = False,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    timeout: Timeout = TIMEOUT_S,
) -> None:
    """Use NODE no more: nothing new is started on it, its workers leave their jobs.

    Exit code: 0, 2 usage or no such node, 69 no coordinator, 77 key refused.
    """
    with reported():
        with cluster(join, keys, security, timeout).client() as client:
            found = client.drain(node, undo)
        if json_:
            print_json(found)
        else:
            typer.echo(f"node {node}: {found.get('state', '')}")
