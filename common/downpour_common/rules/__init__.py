"""Optimizers that torch does not have: ordinary ``torch.optim.Optimizer`` classes, one file each.

A script makes one, alone or in a job (``downpour.optim``); the servers run the same class on their part of the model.
This package imports torch only with the modules in it, so that whoever only wants names does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from downpour_common.errors import ConfigError
from downpour_common.optimizers import OWN_RULES, RULE_NAMES

if TYPE_CHECKING:
    from torch.optim import Optimizer


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of a rule of :data:`RULE_NAMES`. Raises :class:`ConfigError` where this torch does not have it."""
    if name not in RULE_NAMES:
        raise ConfigError(f"no update rule is called {name!r}; known: {', '.join(RULE_NAMES)}")
    found: type[Optimizer] | None = getattr(importlib.import_module(OWN_RULES.get(name, "torch.optim")), name, None)
    if found is None:
        raise ConfigError(f"this version of torch has no torch.optim.{name}; install a newer one")
    return found
