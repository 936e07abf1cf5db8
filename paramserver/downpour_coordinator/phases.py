"""The phases of a job's life, as :mod:`downpour_coordinator.lifecycle` draws them."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where a job is; see :mod:`downpour_coordinator.lifecycle`."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    TRAINING = "TRAINING"
    KEEPING = "KEEPING"
    LEAVING = "LEAVING"
    SAVING = "SAVING"
    EXPORTING = "EXPORTING"
    CLOSING = "CLOSING"
    ENDING = "ENDING"
    WAITING = "WAITING"
    OVER = "OVER"


REPLICATED = (Phase.STARTING, Phase.TRAINING, Phase.KEEPING, Phase.LEAVING, Phase.SAVING)
"""Phases in which a shard without a backup gets one."""
MEASURED = (Phase.TRAINING, Phase.KEEPING, Phase.LEAVING, Phase.SAVING, Phase.CLOSING)
"""Phases with rows of measures."""
