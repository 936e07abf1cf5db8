"""``downpour trace`` and ``downpour report``: what a traced job did when, as a file for Perfetto and as figures.

::

    command   the command lines
    target    what was named: a run directory, a job of a cluster
    read      lines of spans.jsonl → spans on one clock         (no I/O, like all that follow)
    chrome    spans → Chrome's trace format
    measure   spans → utilisation, shares of time, memory, bytes moved
    show      these as text and as JSON
    lanes     the swimlane as text
    picture   … and as SVG or HTML

``register(app)`` adds the commands. Nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.trace.command import register

__all__ = ["register"]
