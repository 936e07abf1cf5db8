"""``downpour checkpoint``: makes, lists, verifies and exports checkpoints, wherever they lie.

::

    command   the command line
    target    what was named: a folder, a URL, a job of a cluster, a run under way
    job       the checkpoints of a job of a cluster, read through its coordinator
    now       has a checkpoint made, and waits for it
    show      what is printed, as text and as JSON

Nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.checkpoint.command import checkpoint_app

__all__ = ["checkpoint_app"]
