"""The optimizers whose update rules the servers know, by the name of their torch.optim class."""

from __future__ import annotations

RULE_NAMES: tuple[str, ...] = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam")

IMPLEMENTATION_OPTIONS = frozenset({"params", "fused", "foreach", "capturable", "differentiable"})
"""Keys of a param group that choose how torch computes, not what; they never travel."""
