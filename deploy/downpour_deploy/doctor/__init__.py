"""``downpour doctor``: looks at this host and at the way to a coordinator, and says what to do.

::

    command         the command line
    facts           what is known, as plain values
    verdict         PASS, WARN or FAIL, what was found, one thing to do; the exit code
    judge           facts → verdicts, all of them            (no I/O, like the next three)
    judge_way       … about the way to the coordinator
    judge_cluster   … about the coordinator and its nodes
    judge_host      … about this host
    gather          from the command line to facts, by way of the next four
    look_keys       gathers facts from the folder of keys
    look_way        … from name service, sockets and interfaces
    look_cluster    … from the coordinator
    look_host       … from this host's limits, memory, disks and torch
    show            verdicts as text and as JSON

``register(app)`` adds the command. Nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.doctor.command import register

__all__ = ["register"]
