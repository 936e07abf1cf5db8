"""The commands that talk to a cluster as its user: submit, list, status, logs, wait, cancel, scale, nodes, drain, get.

``register(app)`` adds them. Nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.jobs.commands import register

__all__ = ["register"]
