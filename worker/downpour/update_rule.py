"""Which update rule the servers run for the optimizer that the script has made."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch

from downpour_common.errors import ConfigError, ModelError
from downpour_common.model import ModelSpec
from downpour_common.optimizers import OWN_RULES, RULE_NAMES, TORCH_RULES, WHOLE_RULES, parse_user_rule
from downpour_common.rules import optimizer_class


class Rule(NamedTuple):
    """An update rule's name in the model's specification, and whether it looks at whole tensors."""

    name: str
    whole: bool


def rule_of(optimizer: torch.optim.Optimizer, own: str = "") -> Rule:
    """The rule for ``optimizer``. ``own``: ``module:Class`` that the job brings. Raises :class:`ModelError`."""
    cls = type(optimizer)
    if own:
        return _own_rule(cls, own)
    try:
        known = optimizer_class(cls.__name__)
    except ConfigError:
        known = None
    if known is not cls:
        raise ModelError(
            f"optimizer {cls.__module__}.{cls.__qualname__} has no update rule at the servers; "
            f"use one of torch.optim's {', '.join(TORCH_RULES)}, "
            f"one of downpour.optim's {', '.join(OWN_RULES)}, or, if it is a class of your own in a module beside the "
            f"script, downpour run --rule MODULE:{cls.__name__}"
        )
    return Rule(cls.__name__, cls.__name__ in WHOLE_RULES)


def check_steps_here(optimizer: torch.optim.Optimizer) -> None:
    """That ``optimizer`` can take steps of its own in a worker; almost any can. Raises :class:`ModelError`."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ModelError("optimizer SparseAdam wants sparse gradients, and those of a job are dense; use Adam")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ModelError("an optimizer with differentiable=True cannot be distributed: its weights are exchanged")


def _own_rule(cls: type[torch.optim.Optimizer], own: str) -> Rule:
    rule = parse_user_rule(own)
    if cls.__module__ == "__main__":
        raise ModelError(
            f"--rule {own}: {cls.__qualname__} is defined in the script, which shards must not run; "
            "move it to a module beside the script, and import it from there"
        )
    try:
        wanted = getattr(importlib.import_module(rule.module), rule.name, None)
    except ImportError as error:
        raise ModelError(f"--rule {own}: {rule.module} cannot be imported beside the script: {error}") from error
    if wanted is None:
        raise ModelError(f"--rule {own}: the module {rule.module} has no {rule.name}")
    if wanted is not cls:
        known = cls.__name__ in RULE_NAMES
        hint = f", or leave --rule out and have the servers run {cls.__name__}" if known else ""
        raise ModelError(
            f"--rule {own}: the optimizer given to prepare is {cls.__module__}.{cls.__qualname__}; make it one of "
            f"{rule.module}.{rule.name}{hint}"
        )
    return Rule(own, bool(getattr(cls, "whole_tensors", False)))


def check_parts(spec: ModelSpec) -> None:
    """That no rank of a replica holds a part of a tensor that the rule must see whole. Raises :class:`ModelError`."""
    part = next((t for t in spec.tensors if t.part is not None and t.kind == "trainable"), None)
    if spec.whole and part is not None:
        raise ModelError(
            f"the update rule {spec.rule} looks at whole tensors, and --tensor leaves each rank a part of some, "
            f"such as {part.name}; use a rule that acts element by element (AdamW, Lion), or --pipeline"
        )
