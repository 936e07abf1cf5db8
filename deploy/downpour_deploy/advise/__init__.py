"""``downpour advise``: what a run's measures say about how to run it.

::

    command   the command line
    target    what was named: a run directory, a job of a cluster → documents
    facts     documents → :class:`Facts`                              (no I/O, like all that follow)
    advice    what a rule returns; which changes a job can take
    rules_*   rules: facts in, advice out, or None
    rules     all of them, and what they say together
    show      advice as text and as JSON

``register(app)`` adds the command. Nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.advise.command import register

__all__ = ["register"]
