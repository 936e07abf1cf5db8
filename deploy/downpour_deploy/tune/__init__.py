"""``downpour tune``: what a script's batch size costs and brings, found by running it with one after the other.

::

    command     the command line
    search      which batch size comes next, when to stop, which one to take     (no I/O, like the next)
    show        the same as a table and as JSON
    attempt     one run of the script, as a process that leaves nothing behind

What happens inside the script is in :mod:`downpour.tuning`. ``register(app)`` adds the command; nothing here is
imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.tune.command import register

__all__ = ["register"]
