"""The coordinator on an event loop: a thin shell around :class:`downpour_coordinator.state.Coordinator`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TextIO

from downpour_common.errors import DownpourError
from downpour_common.transport import ServerTransport
from downpour_coordinator import checkpoints
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed
from downpour_coordinator.state import Coordinator, Effect, LogRow, Send


class CoordinatorService:
    """Carries out what the state machine decides. ``metrics`` takes one JSON object per line.

    ``on_snapshot(number, error)`` is called for each snapshot that ended; ``error`` is "" for a committed one.
    """

    def __init__(
        self,
        state: Coordinator,
        transport: ServerTransport,
        metrics: TextIO,
        on_snapshot: Callable[[int, str], None],
    ) -> None:
        self.state = state
        self._transport = transport
        self._metrics = metrics
        self._on_snapshot = on_snapshot
        self.problems: list[str] = []

    def pump(self, timeout_s: float = 0.0) -> None:
        """Handle everything that has arrived; waits at most ``timeout_s`` for the first message."""
        while arrived := self._transport.poll(timeout_s):
            timeout_s = 0.0
            for peer, message in arrived:
                try:
                    effects = self.state.handle(peer, message)
                except DownpourError:
                    self._transport.malformed += 1
                    continue
                self.carry_out(effects)

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the state machine asked for."""
        for effect in effects:
            match effect:
                case Send():
                    self._transport.send(effect.peer, effect.message)
                case LogRow():
                    self._log(effect)
                case CommitSnapshot():
                    self._commit(effect)
                case SnapshotFailed():
                    self._on_snapshot(effect.number, effect.reason)

    def _log(self, effect: LogRow) -> None:
        try:
            self._metrics.write(json.dumps(_plain(effect.row), allow_nan=False) + "\n")
        except OSError as error:
            if not self.problems:  # a full disk does not stop the training
                self.problems.append(f"metrics were lost: {error.strerror or error}")

    def _commit(self, effect: CommitSnapshot) -> None:
        try:
            checkpoints.commit(effect.folder, effect.manifest)
        except (DownpourError, OSError) as error:
            self._on_snapshot(effect.number, str(error))
        else:
            self._on_snapshot(effect.number, "")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity; they become strings."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
