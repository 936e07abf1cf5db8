"""Names of spans that all sides know; see ``downpour.spans``."""

from __future__ import annotations

from typing import Final

BUSY: Final = ("forward", "backward")
"""A rank computes: the area that counts for a pipeline's utilisation."""
BETWEEN: Final = ("send", "receive", "exchange")
"""Bytes move between the ranks of a replica, as the fact ``bytes`` says; ``exchange``: all of a group at once."""
MOVING: Final = (*BETWEEN, "push", "pull")
"""… or between a worker and the shards."""
WAITING: Final = "wait"
"""For other processes: at barriers, for samples, for the end of a pass."""
FILE: Final = "spans.jsonl"
"""In the run directory; see docs/tracing.md."""
