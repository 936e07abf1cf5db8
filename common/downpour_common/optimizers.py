"""The optimizers whose update rules the servers know, by the name of their class, and names of rules of a job's own."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from downpour_common.errors import ConfigError

TORCH_RULES: tuple[str, ...] = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "RMSprop",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adadelta",
    "ASGD",
    "Rprop",
    "Muon",
)
"""Classes of torch.optim; Muon since torch 2.9."""

OWN_RULES: dict[str, str] = {
    "LAMB": "downpour_common.rules.lamb",
    "LARS": "downpour_common.rules.lars",
    "FTRL": "downpour_common.rules.ftrl",
    "Lion": "downpour_common.rules.lion",
    "MuonAdamW": "downpour_common.rules.muon",
}
"""Classes of ``downpour.optim``, and their modules, which import torch."""

RULE_NAMES: tuple[str, ...] = (*TORCH_RULES, *OWN_RULES)

WHOLE_RULES = frozenset({"Muon", "LAMB", "LARS", "MuonAdamW"})
"""Those that look at whole tensors; the others act element by element, on any slice of one."""

OUTER_RULE = "OuterSGD"
"""SGD for what local steps have come to; a name of its own, so that no checkpoint mistakes its momentum for SGD's."""

IMPLEMENTATION_OPTIONS = frozenset({"params", "fused", "foreach", "capturable", "differentiable"})
"""Keys of a param group that choose how torch computes, not what; they never travel."""

_USER_RULE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)


class UserRule(NamedTuple):
    """An optimizer class of the job's own."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


def parse_user_rule(text: str) -> UserRule:
    """``module:Class``, as ``--rule`` has it. Raises :class:`ConfigError`; a module's name has no path in it."""
    found = _USER_RULE.fullmatch(text)
    if found is None or len(text) > 200:
        raise ConfigError(
            "rule: expected module:Class, an optimizer class in a module beside the script, such as myrules:SignSGD"
        )
    return UserRule(*found.groups())


def missing_rule(text: str, script: str) -> list[str]:
    """What is wrong if the module of a valid or empty ``--rule`` is not beside ``script``, whose file is there."""
    try:
        rule = parse_user_rule(text) if text else None
    except ConfigError:
        return []  # which the job's description tells
    if rule is None:
        return []
    folder = os.path.dirname(os.path.abspath(script))
    path = os.path.join(folder, *rule.module.split("."))
    if rule.module == os.path.splitext(os.path.basename(script))[0]:
        return [
            f"rule: {rule.module} is the script itself, which shards must not run; move {rule.name} to another module"
        ]
    if os.path.isfile(f"{path}.py") or os.path.isdir(path):
        return []
    return [f"rule: there is no {os.path.relpath(path, folder)}.py beside {script}, where {text} is looked for"]
