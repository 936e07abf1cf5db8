"""``downpour bench``: lets users measure what they have. ``bench net``: the link between two hosts.

::

    command     the command line
    answer      the listening side's answers            (no I/O, like the next two)
    estimate    what measured rates mean: best chunk, time of a step's messages
    show        the same as text and as JSON
    measure     the asking side: round trips and streams over a transport
    identity    keys of a folder, for either side
    reach       connects to the listening side, or says why it cannot
    listen      the listening side's loop
    local       a listening side on this host, for measuring without another

``register(app)`` adds the command. Nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.bench.command import register

__all__ = ["register"]
