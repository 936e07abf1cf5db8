"""``downpour set``: another mode or other settings for a job while it runs.

``register(app)`` adds the command; nothing here is imported before the command line has been parsed but :mod:`typer`.
"""

from __future__ import annotations

from downpour_deploy.change.command import register

__all__ = ["register"]
