"""Optimizers that torch does not have; with and without a launcher, like torch's own.

::

    optimizer = downpour.optim.LAMB(model.parameters(), lr=2e-3)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from downpour_common.optimizers import OWN_RULES

if TYPE_CHECKING:
    from downpour_common.rules.ftrl import FTRL
    from downpour_common.rules.lamb import LAMB
    from downpour_common.rules.lars import LARS
    from downpour_common.rules.lion import Lion
    from downpour_common.rules.muon import MuonAdamW

__all__ = ["FTRL", "LAMB", "LARS", "Lion", "MuonAdamW"]


def __getattr__(name: str) -> Any:
    if name not in OWN_RULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(OWN_RULES)}")
    value = globals()[name] = getattr(importlib.import_module(OWN_RULES[name]), name)
    return value
